"""Ends the process groups of a parent that died without ending them (a SIGKILL, for instance).

Runs as a program of its own with nothing but the standard library: it reads the groups from its
standard input, one a line with its grace period in seconds (or that it has ended), and acts when
the pipe closes without the farewell. With ``DETACHED`` as its argument it is no child of the parent
but of nobody: Ray kills the children of its actors.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

DETACHED = "detached"
FAREWELL = "done\n"
ENDED = "ended"
POLL_SECONDS = 0.05
KILL_SECONDS = 5.0
"""How long a killed process may take to go away."""


def end_groups(groups: Mapping[int, float], reap: Callable[[], object] = lambda: None) -> None:
    """SIGTERM to the leaders of ``groups``, SIGKILL to what is left of each after its grace period.

    Only leaders get the SIGTERM: an engine whose scheduler is ended beside it takes that for a
    crash.

    Args:
        groups: the grace period in seconds of each group.
        reap: called while waiting, so that a parent can collect its children.
    """
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.kill(group, signal.SIGTERM)
    started = time.monotonic()
    while live := live_groups(groups):
        for group in live:
            if time.monotonic() > started + groups[group]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
        reap()
        if time.monotonic() > started + max(groups.values()) + KILL_SECONDS:
            return  # not even a SIGKILL ends a process that waits for a broken device
        time.sleep(POLL_SECONDS)
    reap()


def live_groups(groups: Iterable[int]) -> set[int]:
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
    if sys.argv[1:] == [DETACHED] and os.fork():
        os._exit(0)
    groups: dict[int, float] = {}
    for line in sys.stdin:
        if line == FAREWELL:
            return
        group, grace = line.split()
        if grace == ENDED:
            groups.pop(int(group), None)
        else:
            groups[int(group)] = float(grace)
    end_groups(groups)


if __name__ == "__main__":
    main()
