"""Ending a run early and in order: a signal or a file asks, all ranks agree at the same step."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType


class StopRequest:
    """Notes SIGINT, SIGTERM and the stop file; a second signal ends the process at once.

    Only global rank 0's answer counts: it is broadcast, so every rank stops after the same step.
    """

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._signal_name: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @property
    def reason(self) -> str | None:
        """Why the run should end, or None."""
        if self._signal_name is not None:
            return self._signal_name
        if self._stop_file.exists():
            return f"the file {self._stop_file}"
        return None

    def clear(self) -> None:
        """Delete the stop file, so that the next start goes on."""
        self._stop_file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal_name is not None:
            print("second signal: ending at once", file=sys.stderr, flush=True)
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal_name = signal.Signals(number).name
