"""When an output or a returned value counts as the expected one. Runs outside the sandbox."""

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from itertools import zip_longest

_FLOAT_TOLERANCE = 1e-6
_DECIMAL = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_DECIMALS = re.compile(rf"{_DECIMAL}(?:\s+{_DECIMAL})*")


def same_output(actual: str, expected: str) -> bool:
    """Whether two texts are equal line by line, as LiveCodeBench compares them.

    White space at both ends of a line and empty lines at both ends of a text do not count. Two
    lines that hold nothing but decimal numbers are equal if their numbers are, exactly:
    `1.0 0.50` is `1 0.5`. All else counts. (The reference lets only newlines at the end be
    different. LiveCodeBench takes `inf` and `1_000` for numbers, too.)
    """
    pairs = zip_longest(_lines(actual), _lines(expected))
    return all(left == right or _same_decimals(left, right) for left, right in pairs)


def _lines(text: str) -> Iterator[str]:
    """Lines without white space at their ends, one at a time: texts may have megabytes."""
    end = len(text.rstrip())
    start = len(text) - len(text.lstrip())
    while start < end:
        newline = text.find("\n", start, end)
        stop = end if newline < 0 else newline
        yield text[start:stop].strip()
        start = stop + 1


def _same_decimals(left: str | None, right: str | None) -> bool:
    """Whether two lines hold the same decimal numbers; a line that is missing holds none."""
    if left is None or right is None:
        return False
    if not (_DECIMALS.fullmatch(left) and _DECIMALS.fullmatch(right)):
        return False
    lefts, rights = left.split(), right.split()
    return len(lefts) == len(rights) and all(
        one == other or Decimal(one) == Decimal(other)
        for one, other in zip(lefts, rights, strict=True)
    )


def same_value(actual: object, expected: object) -> bool:
    """Whether two JSON values are equal as Python's are: `1 == 1.0 == True`, and a tuple has
    become a list before. Two floats may differ by 1e-6, absolutely or relatively. Values that are
    nested too deeply for Python are different.
    """
    try:
        return _same(actual, expected)
    except RecursionError:
        return False


def _same(actual: object, expected: object) -> bool:
    if isinstance(actual, float) and isinstance(expected, float):
        close = math.isclose(actual, expected, rel_tol=_FLOAT_TOLERANCE, abs_tol=_FLOAT_TOLERANCE)
        return close or (math.isnan(actual) and math.isnan(expected))
    if isinstance(actual, list) and isinstance(expected, list):
        return len(actual) == len(expected) and all(map(_same, actual, expected))
    if isinstance(actual, dict) and isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(
            _same(actual[key], expected[key]) for key in expected
        )
    return actual == expected
