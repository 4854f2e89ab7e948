"""Judges the rows of a data set one by one: each is parsed, or it is said what is wrong with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sod_mcore.data.errors import DataError, FieldError
from sod_mcore.data.row_files import iterate_rows

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class JudgedRow(Generic[Parsed]):
    """One row and what became of it.

    Attributes:
        number: position in its file, from 0; blank lines do not count.
        row: the fields as they were read; empty where the line holds no object.
        parsed: what the row became; None for a wrong row.
        problem: field, value and what is allowed; empty for a good row.
    """

    number: int
    row: dict[str, Any]
    parsed: Parsed | None
    problem: str = ""


def judge_rows(
    source: Path | str,
    parse: Callable[[int, dict[str, Any]], Parsed],
    limit: int | None = None,
) -> Iterator[JudgedRow[Parsed]]:
    """Every row of ``source``, or the first ``limit``, through ``parse(number, row)``.

    Args:
        source: see :func:`sod_mcore.data.row_files.iterate_rows`.
        parse: may raise FieldError.
        limit: rows to judge; None for all.

    Raises:
        DataError: the file cannot be read at all.
    """
    for number, row in enumerate(itertools.islice(iterate_rows(source), limit)):
        if isinstance(row, FieldError):
            yield JudgedRow(number, {}, None, str(row))
            continue
        try:
            yield JudgedRow(number, row, parse(number, row))
        except FieldError as error:
            yield JudgedRow(number, row, None, str(error))


def read_rows(source: Path | str, parse: Callable[[int, dict[str, Any]], Parsed]) -> list[Parsed]:
    """Every row of ``source``, parsed; as :func:`judge_rows`, for those who need all of them.

    Raises:
        DataError: the file cannot be read, is empty, or has malformed rows: the first of them is
            named, with its field, the value and the mend, and the others are counted.
    """
    parsed: list[Parsed] = []
    first_problem = ""
    num_malformed = 0
    for judged in judge_rows(source, parse):
        if judged.parsed is None:
            first_problem = first_problem or f"{source}, row {judged.number}, {judged.problem}"
            num_malformed += 1
        else:
            parsed.append(judged.parsed)
    if num_malformed:
        further = f" ({num_malformed - 1} further malformed rows)" if num_malformed > 1 else ""
        raise DataError(first_problem + further)
    if not parsed:
        raise DataError(f"{source}: the file has no rows")
    return parsed
