"""Looks at the process table, to see whether a sandbox leaves anything behind."""

import contextlib
import ctypes
import os
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper(enable: bool) -> None:
    """While enabled, orphans of our descendants become our children, so that we can count them."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(enable), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _parents() -> dict[int, int]:
    """Parent of every process, zombies included."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The name, in parentheses, may contain anything.
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    return parents


def descendants(pid: int | None = None) -> set[int]:
    """All processes below `pid` (this one by default), zombies included."""
    parents = _parents()
    found: set[int] = set()
    level = {pid or os.getpid()}
    while level:
        level = {child for child, parent in parents.items() if parent in level} - found
        found |= level
    return found


def executable(pid: int) -> str:
    """The first word of a process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def reap_orphans(seconds: float) -> int:
    """Reap all children, which must end by themselves in `seconds`, and count them.

    Raises:
        TimeoutError: some still live.
    """
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return count
        if pid:
            count += 1
        else:
            time.sleep(0.02)
    raise TimeoutError(f"still alive after {seconds} s: {descendants()}")


def reap(pids: set[int], seconds: float) -> None:
    """Reap these processes, orphans that are our children or will be, which must end in `seconds`.

    Raises:
        TimeoutError: some still live.
    """
    deadline = time.monotonic() + seconds
    left = set(pids)
    while left and time.monotonic() < deadline:
        for pid in sorted(left & descendants()):
            with contextlib.suppress(ChildProcessError):  # not ours yet
                os.waitpid(pid, os.WNOHANG)
        left &= descendants()
        time.sleep(0.02)
    if left:
        raise TimeoutError(f"still alive after {seconds} s: {left}")
