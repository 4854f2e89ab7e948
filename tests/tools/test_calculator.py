"""The calculator: values against Python's own, and expressions that must not take long or run."""

import math
import time

import pytest

from sod_mcore.tools import Calculator, Tool, ToolResult
from sod_mcore.tools.calculator import MAX_CHARACTERS, CalculatorError, calculate, format_number


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", 14),
        ("-(2 - 5) ** 2", -9),
        ("7 // 2 + 7 % 2", 4),
        ("1 / 4", 0.25),
        ("1e3 + 1_000", 2000.0),
        ("0x10", 16),
        (" 2 ** 10\n", 1024),
        ("SQRT(2) * Pi", math.sqrt(2) * math.pi),
        ("log(e) + log(8, 2) + log10(100)", 6.0),
        ("max(1, min(5, 3)) + abs(-2)", 5),
        ("round(2.567, 2) + round(7.4)", 9.57),
        ("floor(2.7) + ceil(2.1) + gcd(12, 18)", 11),
        ("factorial(170)", math.factorial(170)),
        ("2 ** -2", 0.25),
        ("2 ** 1023", 2**1023),
        ("2 ** 1000 * 2 ** 23", 2**1023),
        ("1 ** 10 ** 300 + (-1) ** 10 ** 300 + 0 ** 10 ** 300", 2),
        ("10 ** 300 * 1.5", 1.5e300),
        ("round(10 ** 300, -50)", 10**300),
        ("2 ** -1074", 2.0**-1074),
        ("-" * 150 + "1", 1),
    ],
)
def test_values(expression: str, value: float) -> None:
    assert calculate(expression) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("9**9**9", "too large"),
        ("9.0**9**9", "too large"),
        ("2**1024 * 2", "too large"),
        ("2**1024", "too large"),
        ("3**1023", "too large"),
        ("2**1000 * 2**24", "too large"),
        ("2**10**300", "too large"),
        ("(-3)**9**99", "too large"),
        ("10**300 * 10**300", "too large"),
        ("1e308 * 10", "too large"),
        ("factorial(171)", "from 0 to 170"),
        ("factorial(factorial(170))", "from 0 to 170"),
        ("round(5, -10**9)", "50 digits"),
        ("1 / 0", "division by zero"),
        ("5 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("(-8) ** 0.5", "not a real number"),
        ("sqrt(-1)", "math domain error"),
        ("1j", "only numbers"),
        ("2 ^ 3", r"'\^' is not allowed; write \*\* for a power"),
        ("x + 1", "'x' is unknown here; there are abs"),
        ("__import__(1)", "'__import__' is unknown"),
        ("pi.real", "only numbers"),
        ("(1).__class__", "only numbers"),
        ("[1]", r"'\[' is not allowed"),
        ("'a' * 9", '"\'" is not allowed'),
        ("1 if 1 else 2", "only numbers"),
        ("(1, 2)", "only numbers"),
        ("max(*(1, 2))", "only numbers"),
        ("true", "'true' is unknown"),
        ("min()", "at least 1 argument"),
        ("gcd(1.5)", "cannot be interpreted as an integer"),
        ("1 +", "not one arithmetic expression"),
        ("", "not one arithmetic expression"),
        ("1\n2", r"is not allowed"),
        ("(" * 150, "not one arithmetic expression"),
        ("1" * (MAX_CHARACTERS + 1), "longer than 200 characters"),
        ("1+" * 10_000_000 + "1", "longer than 200 characters"),
    ],
)
def test_refusals_are_quick_and_clear(expression: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(CalculatorError, match=message):
        calculate(expression)
    assert time.process_time() - started < 0.5


def test_format() -> None:
    assert format_number(2**100, 256) == "1267650600228229401496703205376"
    assert format_number(2**100, 30) == "1.26765060023e+30"
    assert format_number(0.1 + 0.2, 256) == "0.3"
    assert format_number(0, 256) == "0"
    assert format_number(4.0, 256) == "4"


@pytest.mark.asyncio
async def test_call() -> None:
    tool: Tool = Calculator()
    assert await tool.call({"expression": "6 * 7"}) == ToolResult("42", True)
    assert await tool.call({"expression": "1 / 0"}) == ToolResult("Error: division by zero.", False)
    for arguments in ({}, {"expression": 5}, {"code": "1"}):
        result = await tool.call(arguments)
        assert not result.succeeded
        assert "`expression`" in result.text
    function = tool.schema["function"]
    assert isinstance(function, dict)
    assert (function["name"], list(function["parameters"]["properties"])) == (
        "calculator",
        ["expression"],
    )
