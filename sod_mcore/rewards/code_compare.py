"""When an output or a returned value counts as the expected one. Runs outside the sandbox."""

import math
from collections.abc import Iterator
from itertools import zip_longest

_FLOAT_TOLERANCE = 1e-6


def same_output(actual: str, expected: str) -> bool:
    """Whether two texts are equal line by line.

    White space at the end of a line and empty lines at the end do not count; all else does. (The
    reference lets only newlines at the end be different.)
    """
    pairs = zip_longest(_lines(actual), _lines(expected))
    return all(left == right for left, right in pairs)


def _lines(text: str) -> Iterator[str]:
    """Lines without white space at their ends, one at a time: texts may have megabytes."""
    end = len(text.rstrip())
    start = 0
    while start < end:
        newline = text.find("\n", start, end)
        stop = end if newline < 0 else newline
        yield text[start:stop].rstrip()
        start = stop + 1


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
