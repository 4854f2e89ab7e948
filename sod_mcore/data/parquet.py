"""Reads rows of Parquet files, and says clearly which row and field of a file is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

Row = TypeVar("Row")


class DataError(Exception):
    """A data file that cannot be used, in one line."""


class FieldError(Exception):
    """One field of one row is wrong."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")


def read_rows(path: Path, parse: Callable[[int, dict[str, Any]], Row]) -> list[Row]:
    """Every row of ``path`` through ``parse(row number, row)``, which may raise FieldError.

    Raises:
        DataError: the file is missing, is not Parquet, is empty, or has malformed rows: the first
            of them is named, with its field, the value and the mend, and the others are counted.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of a Parquet file")
    parsed: list[Row] = []
    first_problem = ""
    num_malformed = 0
    for number, row in enumerate(_iterate(path)):
        try:
            parsed.append(parse(number, row))
        except FieldError as error:
            first_problem = first_problem or f"{path}, row {number}, {error}"
            num_malformed += 1
    if num_malformed:
        further = f" ({num_malformed - 1} further malformed rows)" if num_malformed > 1 else ""
        raise DataError(first_problem + further)
    if not parsed:
        raise DataError(f"{path}: the file has no rows")
    return parsed


def text_field(row: dict[str, Any], name: str) -> str:
    """A field that must hold text."""
    value = row.get(name)
    if not isinstance(value, str):
        raise FieldError(name, f"is {_short(value)}; text is needed")
    return value


def mapping_field(row: dict[str, Any], name: str, default: dict[str, Any] | None = None) -> Any:
    """A field that must hold a struct, or JSON text of an object."""
    value = _decoded(name, row.get(name))
    if value is None and default is not None:
        return default
    if not isinstance(value, dict):
        raise FieldError(name, f"is {_short(value)}; a struct (or JSON text of one) is needed")
    return value


def list_field(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A field that must hold a list of structs, or JSON text of one; absent is empty."""
    value = _decoded(name, row.get(name))
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise FieldError(name, f"is {_short(value)}; a list of structs is needed")
    return [_without_nulls(item) for item in value]


def messages_field(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A field that must hold chat messages, at least one; a missing content becomes empty."""
    messages = list_field(row, name)
    if not messages:
        raise FieldError(name, "is empty; a list of {role, content} is needed")
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            problem = f"is {_short(message.get('role'))}; text is needed"
            raise FieldError(f"{name}[{number}].role", problem)
        if not isinstance(message.setdefault("content", ""), str):
            problem = f"is {_short(message['content'])}; text is needed"
            raise FieldError(f"{name}[{number}].content", problem)
    return messages


def _iterate(path: Path) -> Iterator[dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    for batch in table.to_batches():
        yield from batch.to_pylist()


def _decoded(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        problem = f"is {_short(value)}; a struct, or JSON text of one, is needed ({error})"
        raise FieldError(name, problem) from error


def _without_nulls(value: Any) -> Any:
    """Parquet fills the fields that a struct lacks with nulls; chat templates must not see them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
