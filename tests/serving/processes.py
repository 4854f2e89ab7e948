"""Which processes exist, read from /proc."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]

from sod_mcore.serving.endpoints import process_fields, process_start_ticks

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


def leader_at(pid: int, url: str) -> int:
    """The process below ``pid`` that leads a group and listens at the port of ``url``."""
    found = []
    for child, _ in descendants(pid):
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):  # it ended meanwhile
            if os.getpgid(child) == child and urlsplit(url).port in _listening_ports(child):
                found.append(child)
    assert len(found) == 1, found
    return found[0]


def _listening_ports(pid: int) -> set[int]:
    connections = psutil.Process(pid).net_connections(kind="tcp")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


def running(processes: Iterable[Process]) -> set[Process]:
    """Those of ``processes`` that still run."""
    return {(pid, start) for pid, start in processes if process_start_ticks(pid) == start}


def wait_until_gone(processes: Iterable[Process], seconds: float) -> set[Process]:
    """Those that still run after ``seconds``; returns as soon as none does."""
    deadline = time.monotonic() + seconds
    while (left := running(processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
