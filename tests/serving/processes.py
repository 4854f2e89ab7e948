"""Which processes exist, read from /proc."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from sod_mcore.serving.fleet import process_fields, process_start_ticks

Process = tuple[int, int]
"""A process id and the start time that tells it from a later process with the same id."""


def descendants(pid: int) -> set[Process]:
    """All living processes below ``pid``."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := process_fields(int(folder.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found: set[Process] = set()
    pending = list(children.get(pid, []))
    while pending:
        child = pending.pop()
        start = process_start_ticks(child)
        if start is not None:
            found.add((child, start))
        pending += children.get(child, [])
    return found


def running(processes: Iterable[Process]) -> set[Process]:
    """Those of ``processes`` that still run."""
    return {(pid, start) for pid, start in processes if process_start_ticks(pid) == start}


def wait_until_gone(processes: Iterable[Process], seconds: float) -> set[Process]:
    """Those that still run after ``seconds``; returns as soon as none does."""
    deadline = time.monotonic() + seconds
    while (left := running(processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
