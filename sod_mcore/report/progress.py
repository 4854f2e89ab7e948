"""Progress of rollout, scoring and training: a bar on a terminal, a few plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm


class Progress:
    """Counts up to ``total``; use as a context manager.

    Where ``stream`` is not a terminal, a line is written at the start of counting, at the end, and
    in between not more often than every ``seconds_between_lines``.
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        unit: str = "it",
        stream: TextIO | None = None,
        seconds_between_lines: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._stream = stream if stream is not None else sys.stderr
        self._seconds_between_lines = seconds_between_lines
        self._clock = clock
        self._count = 0
        self._facts = ""
        self._started = clock()
        self._last_line: tuple[float, int] | None = None
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total, desc=description, unit=unit, file=self._stream, leave=True
            )

    def advance_to(self, count: int, **facts: float | int | str) -> None:
        """Set the count, and short ``facts`` to show beside it."""
        newly_done = count - self._count
        self._count = count
        self._facts = ", ".join(f"{name} {_short(value)}" for name, value in facts.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._facts, refresh=False)
            self._bar.update(newly_done)
        elif self._is_line_due():
            self._write_line()

    def advance(self, count: int = 1, **facts: float | int | str) -> None:
        """Add ``count``."""
        self.advance_to(self._count + count, **facts)

    def close(self) -> None:
        """Show the last state."""
        if self._bar is not None:
            self._bar.close()
        elif self._last_line is None or self._last_line[1] != self._count:
            self._write_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _is_line_due(self) -> bool:
        if self._last_line is None:
            return True
        return self._clock() - self._last_line[0] >= self._seconds_between_lines

    def _write_line(self) -> None:
        now = self._clock()
        self._last_line = (now, self._count)
        facts = f" ({self._facts})" if self._facts else ""
        print(
            f"{self._description}: {self._count}/{self._total} {self._unit} "
            f"in {now - self._started:.0f} s{facts}",
            file=self._stream,
            flush=True,
        )


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
