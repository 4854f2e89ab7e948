"""Ending a run early and in order: a signal or a file asks, all ranks agree at the same place.

Python runs a signal handler in the main thread between two bytecodes: never while that thread waits
in a collective. So a thread of its own reads the signals. When the run has not ended within the
grace period, because a step is longer or a rank is stuck, that thread shows where the process is
and ends it, before torchrun or a scheduler kills it without a word.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):
    """Every rank has agreed to end the run here; nothing is wrong."""


class StopRequest:
    """Notes SIGINT, SIGTERM and the stop file; a second signal ends the process at once.

    Until one is made, signals have their default effect: there is nothing to save yet.
    """

    def __init__(
        self,
        stop_file: Path,
        grace_seconds: float,
        on_overdue: Callable[[str], None] = lambda problem: None,
    ) -> None:
        """Begin to listen; from the main thread only, once in a process.

        Args:
            stop_file: asks for a stop as long as it exists; without a limit in time.
            grace_seconds: time between a signal and the forced end of the process.
            on_overdue: told why, just before a forced end.
        """
        self._stop_file = stop_file
        self._grace_seconds = grace_seconds
        self._on_overdue = on_overdue
        self._signal_name: str | None = None
        self._is_disarmed = False
        self._pipe, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, _leave_to_the_thread)
        threading.Thread(target=self._listen, name="stop-signals", daemon=True).start()

    @property
    def reason(self) -> str | None:
        """Why the run should end, or None."""
        if self._signal_name is not None:
            return self._signal_name
        if self._stop_file.exists():
            return f"the file {self._stop_file}"
        return None

    @property
    def is_signalled(self) -> bool:
        """Whether a signal asked, not only the file."""
        return self._signal_name is not None

    def disarm(self) -> None:
        """End no process by force any more because of a first signal: all is saved."""
        self._is_disarmed = True

    def clear(self) -> None:
        """Delete the stop file, so that the next start goes on."""
        self._stop_file.unlink(missing_ok=True)

    def _listen(self) -> None:
        first = self._next_signal(None)
        assert first is not None
        self._signal_name = signal.Signals(first).name
        second = self._next_signal(self._grace_seconds)
        if second is not None:
            print("error: second signal: ended at once", file=sys.stderr, flush=True)
            os._exit(128 + second)
        if self._is_disarmed:
            return
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        problem = (
            f"{self._signal_name} came, and the run did not end within {self._grace_seconds:g} s "
            "(the stacks above show where it was); it continues from its newest checkpoint"
        )
        try:
            self._on_overdue(problem)
        finally:
            print(f"error: {problem}", file=sys.stderr, flush=True)
            os._exit(1)

    def _next_signal(self, timeout_seconds: float | None) -> int | None:
        """The next stop signal; None if none comes in time."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return None
            number = os.read(self._pipe, 1)[0]
            if number in STOP_SIGNALS:
                return number


def _leave_to_the_thread(number: int, frame: object) -> None:
    """Python writes the number to the pipe before it calls a handler; there must be one."""
