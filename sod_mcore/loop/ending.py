"""The end of a training program, however it comes: in order, within seconds, the cause said last.

Around everything that a rank does after its settings are read. What was opened is closed; the cause
is printed once, by the rank that met it; ``ended.json`` and torchrun's own report repeat it. Ranks
that fail only because another one did say so in one line.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, NoReturn

import psutil  # type: ignore[import-untyped]

from sod_mcore.loop.causes import Cause, cause_of
from sod_mcore.loop.stop import StopRequest
from sod_mcore.outcome import (
    Outcome,
    forget_outcome_before,
    reserve_outcome,
    set_outcome_aside,
    suggest_outcome,
    write_outcome,
)
from sod_mcore.platform.parent_death import die_with_parent

CLOSE_SECONDS = 15.0
"""Longest time that closing may take after a failure; what hangs then ends with the process."""
LAUNCHER_SECONDS = 5.0
"""How long a rank that lost another one waits for torchrun, so that torchrun reports that one."""


class Ending:
    """What must be known, and closed, when the program ends.

    Attributes:
        stack: closes what was opened, in reverse order.
        completed_steps: training steps done so far.
        stop: what listens to signals, once the loop is about to begin.
    """

    def __init__(self, directory: Path) -> None:
        self.stack = ExitStack()
        self.completed_steps = 0
        self.stop: StopRequest | None = None
        self._directory = directory
        self._rank = int(os.environ.get("RANK", "0"))
        self._has_succeeded = False

    def set_aside(self) -> None:
        """Take away what an earlier start said about its end, until it is known to be past."""
        if self._rank == 0:
            set_outcome_aside(self._directory)

    def begin(self, stop: StopRequest) -> None:
        """The loop is about to begin: signals are heard, and how the run ended before is past.

        Raises:
            OSError: the disk is full.
        """
        self.stop = stop
        if self._rank == 0:
            forget_outcome_before(self._directory)
            reserve_outcome(self._directory)

    def succeed(self, outcome: Literal["finished", "stopped"], reason: str) -> None:
        """Write how the run ended, on rank 0; everything that it names is on disk.

        What goes wrong from here on, while things are closed, does not change that.
        """
        if self._rank == 0:
            write_outcome(self._directory, Outcome(outcome, self.completed_steps, reason))
        if self.stop is not None:
            self.stop.disarm()
        self._has_succeeded = True

    def record_failure(self, reason: str, *, is_secondary: bool = False) -> None:
        """Write why the run failed; a rank that failed because of another never overrules it."""
        if self._has_succeeded:
            return
        outcome = Outcome("failed", self.completed_steps, reason)
        try:
            if is_secondary:
                suggest_outcome(self._directory, outcome)
                return
            if self.stop is None:  # this rank may be faster than rank 0
                set_outcome_aside(self._directory)
            write_outcome(self._directory, outcome)
        except (OSError, ValueError) as error:
            print(f"ended.json could not be written: {error}", file=sys.stderr, flush=True)

    def record_forced_end(self, reason: str) -> None:
        """Before this rank is ended by force: record why, and end ranks that it may wait for.

        A rank that met the cause has said so by now; this one may only have waited for it.
        """
        self.record_failure(reason, is_secondary=True)
        _kill_stopped_siblings()

    def close(self) -> None:
        """Close what was opened, after all went well; a failure is told and changes nothing."""
        try:
            self.stack.close()
        except Exception as error:
            if not self._has_succeeded:
                raise
            print(f"while closing: {cause_of(error).line}", file=sys.stderr, flush=True)

    def fail(self, error: Exception) -> NoReturn:
        """Record the cause, close everything, print the cause, end the process."""
        cause = cause_of(error)
        terminated = threading.Event()
        if self.stop is not None and self.stop.is_signalled:
            terminated.set()
        signal.signal(signal.SIGTERM, lambda number, frame: terminated.set())
        overdue = threading.Timer(CLOSE_SECONDS, self._leave, [error, cause])
        overdue.daemon = True
        overdue.start()
        self.record_failure(cause.line, is_secondary=cause.is_secondary)
        if not cause.is_secondary:
            _tell_torchrun(error, cause)
        if cause.is_timeout:
            _kill_stopped_siblings()
        try:
            self.stack.close()
            atexit._run_exitfuncs()  # temporary folders of W&B, for instance
        except Exception as second:
            print(f"while closing: {cause_of(second).line}", file=sys.stderr, flush=True)
        if cause.is_secondary:
            terminated.wait(LAUNCHER_SECONDS)
        self._leave(error, cause)

    def _leave(self, error: Exception, cause: Cause) -> NoReturn:
        """Print and end at once: threads and libraries that hang do not hold this up."""
        if cause.is_secondary:
            print(f"rank {self._rank} ends as well: {cause.line}", file=sys.stderr)
        elif self._rank == 0 or not cause.is_everywhere:
            if not cause.is_expected:
                traceback.print_exception(error)
            rank = f"rank {self._rank}: " if self._rank else ""
            print(f"error: {rank}{cause.line}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(cause.exit_code)


@contextmanager
def ending_in_order(directory: Path) -> Iterator[Ending]:
    """Run the body of a training program; an exception ends the process (:meth:`Ending.fail`).

    Args:
        directory: the run's folder.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    ending = Ending(directory)
    try:
        ending.set_aside()
        yield ending
        ending.close()
    except Exception as error:
        ending.fail(error)
    finally:
        ending.stack.close()


def _kill_stopped_siblings() -> None:
    """End ranks of this launcher that are suspended: its SIGTERM would wait in vain for 30 s."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return  # the parent is no launcher, and its children are no ranks
    with suppress(psutil.Error):
        for sibling in psutil.Process(os.getppid()).children():
            with suppress(psutil.Error):  # torchrun may collect it meanwhile
                if sibling.status() == psutil.STATUS_STOPPED:
                    sibling.kill()


def _tell_torchrun(error: Exception, cause: Cause) -> None:
    """Write the file from which torchrun's report takes the cause."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    stack = "" if cause.is_expected else "".join(traceback.format_exception(error))
    report = {
        "message": {
            "message": cause.line,
            "extraInfo": {
                "py_callstack": f"{stack}error: {cause.line}",
                # torchrun compares whole seconds, and takes the first of equals, which may be a
                # rank that only lost this one.
                "timestamp": str(int(time.time()) - 1),
            },
        }
    }
    try:
        Path(path).write_text(json.dumps(report))
    except OSError as failure:
        print(f"torchrun is not told the cause: {failure}", file=sys.stderr, flush=True)
