"""Child processes that never outlive their parent, each with a log file and a group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sod_mcore.serving.fleet import watchdog

GRACE_SECONDS = 15.0
"""Time that an engine gets between SIGTERM and SIGKILL."""
KILL_SECONDS = 60.0
"""How long a killed group may take to go away: the kernel frees an engine's memory first."""


@dataclass(frozen=True)
class Child:
    """A started process, leader of its own process group.

    Attributes:
        name: what people call it, such as "student engine 1".
        process: the group's leader.
        log_path: file with its standard output and error; None if it writes to ours.
        log_start: size of that file when the process was started.
        grace_seconds: time between SIGTERM and SIGKILL.
    """

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path | None = None
    log_start: int = 0
    grace_seconds: float = GRACE_SECONDS

    @property
    def exit_code(self) -> int | None:
        """Exit code of the leader, negative for a signal; None while it runs."""
        return self.process.poll()

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that this process, not an earlier one, wrote to its log."""
        if self.log_path is None:
            return ""
        return log_tail(self.log_path, self.log_start, lines)


def log_tail(path: Path, start: int, lines: int) -> str:
    """The last lines of a log, from a byte on; none while there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])


class Children:
    """Starts processes and ends them all, also when this process is killed with SIGKILL.

    A watchdog process holds the other end of a pipe. When the pipe closes without a farewell, this
    process has died, and the watchdog ends every group that was started.

    Args:
        is_actor: this process is a Ray actor. Ray kills the children of one, so the watchdog is
            none; and what is left of an engine then is killed at once, for its GPUs may be another
            one's already.
    """

    def __init__(self, *, is_actor: bool = False) -> None:
        self._is_actor = is_actor
        self._watchdog = subprocess.Popen(
            [sys.executable, watchdog.__file__, *([watchdog.DETACHED] if is_actor else [])],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        if is_actor:
            self._watchdog.wait(timeout=GRACE_SECONDS)  # for the fork that leaves it behind
        self._children: list[Child] = []

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        grace_seconds: float = GRACE_SECONDS,
    ) -> Child:
        """Start ``command``; with a ``log_path`` its output is appended there.

        Raises:
            OSError: the program does not exist or cannot be executed.
        """
        with contextlib.ExitStack() as stack:
            log_start, output = 0, None
            if log_path is not None:
                log_path.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log_path.open("ab"))
                log_start = output.tell()
            process = subprocess.Popen(
                list(command),
                env=None if environment is None else dict(environment),
                stdin=None if output is None else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._tell_watchdog(f"{process.pid} {0.0 if self._is_actor else grace_seconds}\n")
        child = Child(name, process, log_path, log_start, grace_seconds)
        self._children.append(child)
        return child

    def kill(self, child: Child) -> bool:
        """SIGKILL to what is left of one child's group, which is no longer counted then.

        Returns:
            whether all of it is gone; not even a SIGKILL ends a process that waits for a broken
            device.
        """
        group = child.process.pid
        if child not in self._children:
            return True  # its number may be another group's by now
        deadline = time.monotonic() + KILL_SECONDS
        while watchdog.live_groups([group]):
            if time.monotonic() > deadline:
                return False
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            time.sleep(watchdog.POLL_SECONDS)
        child.process.wait(timeout=GRACE_SECONDS)
        self._children.remove(child)
        self._tell_watchdog(f"{group} {watchdog.ENDED}\n")
        return True

    def stop(self) -> None:
        """SIGTERM to every leader, SIGKILL to what is left of the groups after the grace period."""
        self._end(self._children)
        self._children.clear()
        self._tell_watchdog(watchdog.FAREWELL)
        if self._watchdog.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._watchdog.stdin.close()
        self._watchdog.wait(timeout=GRACE_SECONDS)

    def _end(self, children: Sequence[Child]) -> None:
        groups = {child.process.pid: child.grace_seconds for child in children}
        watchdog.end_groups(groups, reap=lambda: [c.exit_code for c in children])
        for child in children:
            child.process.wait(timeout=GRACE_SECONDS)

    def _tell_watchdog(self, line: str) -> None:
        if self._watchdog.stdin is None or self._watchdog.stdin.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.write(line.encode())
            self._watchdog.stdin.flush()


def shell_exit_code(exit_code: int) -> int:
    """The exit code that a shell reports: 128 + signal for a process that a signal ended."""
    return exit_code if exit_code >= 0 else 128 - exit_code


def forward_signal(child: Child, number: signal.Signals) -> None:
    """Send a signal to the leader of a child's group, if it still runs."""
    if child.exit_code is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.process.pid, number)
