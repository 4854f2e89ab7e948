"""The two errors of data: a file that cannot be used, and a field of a row that is wrong."""

from __future__ import annotations

from typing import Any


class DataError(Exception):
    """A data file that cannot be used, in one line."""


class FieldError(Exception):
    """One field of one row is wrong."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")


def shortened(value: Any, limit: int = 80) -> str:
    """The literal of ``value``, cut to ``limit`` characters for a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(error: BaseException) -> str:
    """What an exception of another package says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
