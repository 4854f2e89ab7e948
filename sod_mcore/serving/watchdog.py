"""Ends the process groups of a parent that died without ending them (a SIGKILL, for instance).

Runs as a program of its own with nothing but the standard library: it reads the groups from its
standard input, one number a line (negative: that group has ended), and acts when the pipe closes
without the farewell.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

FAREWELL = "done\n"
POLL_SECONDS = 0.05


def end_groups(
    groups: Sequence[int], grace_seconds: float, reap: Callable[[], object] = lambda: None
) -> None:
    """SIGTERM to the leaders of ``groups``, SIGKILL to whatever is left after the grace period.

    Only leaders get the SIGTERM: an engine whose scheduler is ended beside it takes that for a
    crash. ``reap`` is called while waiting, so that a parent can collect its children.
    """
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.kill(group, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while live_groups(groups) and time.monotonic() < deadline:
        reap()
        time.sleep(POLL_SECONDS)
    for group in live_groups(groups):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    reap()


def live_groups(groups: Sequence[int]) -> set[int]:
    """The groups that still have a member which is not a zombie."""
    wanted, live = set(groups), set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            state, group = fields[0], int(fields[2])
            if group in wanted and state not in "ZX":
                live.add(group)
    return live


def main() -> None:
    """Collect the groups until the pipe closes; end them if it closed without the farewell."""
    groups: set[int] = set()
    for line in sys.stdin:
        if line == FAREWELL:
            return
        number = int(line)
        (groups.add if number > 0 else groups.discard)(abs(number))
    end_groups(sorted(groups), float(sys.argv[1]))


if __name__ == "__main__":
    main()
