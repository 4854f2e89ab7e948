"""A JSON-lines file with lines for each training step, which survives crashes and resumes.

A resumed run trains again the steps after its checkpoint. Their old lines are cut off first, so
that a step stands in the file as it was trained last, and nowhere twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sod_mcore.files import naming, write_text

Line = dict[str, Any]


class StepLines:
    """Appends JSON lines that have a ``step``; each call is on disk when it returns."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Open ``path``, without the lines of ``first_step`` and after.

        Raises:
            ValueError: a line before the last is not JSON with a step.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_step_lines(path) if line["step"] < first_step]
        write_text(path, "".join(map(_text, kept)))
        self.last: Line | None = kept[-1] if kept else None
        """The last line."""

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write ``lines`` and wait until they are on disk; NaN and infinity become null."""
        added = [_plain(line) for line in lines]
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(_text(line) for line in added)
            file.flush()
            os.fsync(file.fileno())
        self.last = added[-1] if added else self.last

    def replace_last(self, line: Mapping[str, Any]) -> None:
        """Write ``line`` in place of the last one; a crash leaves the old or the new file."""
        lines = [*read_step_lines(self.path)[:-1], _plain(line)]
        write_text(self.path, "".join(map(_text, lines)))
        self.last = lines[-1]


def read_step_lines(path: Path) -> list[Line]:
    """All lines of a file of :class:`StepLines`; a last line that a crash cut short is left out.

    Raises:
        ValueError: a line before the last is not JSON with a step.
    """
    texts = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    lines = []
    for number, text in enumerate(texts[:-1], start=1):
        try:
            line = json.loads(text)
            int(line["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is not JSON with a step ({text[:80]!r}); "
                "remove the line, or move the file away to begin a new one"
            ) from error
        lines.append(line)
    return lines


def _text(line: Line) -> str:
    return json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types; numpy and torch scalars become numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    number = float(value)
    return number if math.isfinite(number) else None
