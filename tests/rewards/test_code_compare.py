"""When outputs and values are equal."""

import json
import time

import pytest

from sod_mcore.rewards.code.compare import same_output, same_value


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ("1\n2\n", "1\n2"),
        ("1 \n2\t\n\n\n", "1\n2\n"),
        ("1\r\n2\r\n", "1\n2\n"),
        ("", "\n"),
        ("a\n\nb", "a\n  \nb\n"),
        ("a\x0bb\u2028c\n", "a\x0bb\u2028c"),
        (" 1", "1"),
        ("\n\n  1\n  2 \n", "1\n2"),
        ("1.0", "1"),
        ("0.50 2\nYes", "0.5   2.000\nYes"),
        ("-0.0 .5 +3", "0 0.5 3"),
        ("1e-05", "0.00001"),
        ("1" + "0" * 5000, "1" + "0" * 5000 + ".0"),
    ],
)
def test_same_output(actual: str, expected: str) -> None:
    assert same_output(actual, expected)
    assert same_output(expected, actual)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ("1\n2", "1 2"),
        ("1\n\n2", "1\n2"),
        ("1", ""),
        ("1\n2", "1"),
        ("Yes", "yes"),
        ("1.0000001", "1"),
        ("0.1 0.2", "0.1"),
        ("12", "1 2"),
        ("1.0\n2", "1 2"),
        ("x 1.0", "x 1"),
        ("nan", "NaN"),
        ("inf", "Infinity"),
        ("1_0", "10"),
        ("1e9999", "10e9998"),
        ("१", "1"),
        ("0x10", "16"),
        ("", "0"),
    ],
)
def test_different_output(actual: str, expected: str) -> None:
    assert not same_output(actual, expected)
    assert not same_output(expected, actual)


def test_a_long_output_is_compared_quickly() -> None:
    text = "".join(f"{number}\n" for number in range(500_000))
    started = time.monotonic()
    assert same_output(text, text + "\n")
    assert not same_output(text, text + "500000\n")
    assert time.monotonic() - started < 10


def test_hostile_numbers_are_compared_quickly() -> None:
    digits = "9" * 1_000_000
    started = time.monotonic()
    assert not same_output(digits + "1", digits + "2")
    assert not same_output(digits + "x", digits + "y")
    assert not same_output("1 " * 500_000 + "x", "1 " * 500_000 + "y")
    assert not same_output("1e999 " * 200_000, "1e-999 " * 200_000)
    assert same_output("1.0 " * 200_000, "1 " * 200_000)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (1, 1.0),
        (True, 1),
        (0.1 + 0.2, 0.3),
        (1e20 + 1e13, 1e20),
        ([0.1 + 0.2, {"a": 1.0000001}], [0.3, {"a": 1.0}]),
        (float("inf"), float("inf")),
        (float("nan"), float("nan")),
        (None, None),
    ],
)
def test_same_value(actual: object, expected: object) -> None:
    assert same_value(actual, expected)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (1, 2),
        (1, "1"),
        (1.0001, 1.0),
        (10**20 + 1, 10**20),  # whole numbers have no tolerance
        (1.0000001, 1),  # nor have they against a float
        ([1], [1, 2]),
        ([1, 2], [2, 1]),
        ([1], 1),
        ({"a": 1}, {"b": 1}),
        (None, 0),
        ("a ", "a"),
        (float("nan"), 1.0),
    ],
)
def test_different_value(actual: object, expected: object) -> None:
    assert not same_value(actual, expected)


def test_values_nested_too_deeply_are_different() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert not same_value(deep, deep)
    assert same_value(json.loads("[" * 100 + "]" * 100), json.loads("[" * 100 + "]" * 100))
