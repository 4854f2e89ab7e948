"""The `calculator` tool: one arithmetic expression, evaluated here in microseconds.

The model writes the expression, so it is hostile until proven small: length and characters are
checked before Python's parser sees it, only listed syntax is evaluated, and every operation that
could make a large number is bounded before it is done (`9**9**9` would otherwise never end).
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping

from sod_mcore.tools.interface import ToolResult, ToolSchema, function_schema

Number = int | float

MAX_CHARACTERS = 200
MAX_BITS = 1024
"""Of a whole number: the range of floating point, 308 digits."""
_MAX_FACTORIAL = 170  # the last one within MAX_BITS
_ALLOWED = re.compile(r"[0-9a-z_.+\-*/%(), ]*")


class CalculatorError(ValueError):
    """The expression cannot be evaluated; the message is for the model."""


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int):
        # The least that the result can have; so it is computed with twice as many at most.
        _check_bits((base.bit_length() - 1) * exponent + 1)
    result = base**exponent
    if isinstance(result, complex):
        raise CalculatorError(f"{base} ** {exponent} is not a real number")
    return _bounded(result)


def _product(left: Number, right: Number) -> Number:
    return _bounded(left * right)


def _factorial(number: Number) -> int:
    if not isinstance(number, int) or not 0 <= number <= _MAX_FACTORIAL:
        raise CalculatorError(f"factorial takes whole numbers from 0 to {_MAX_FACTORIAL}")
    return math.factorial(number)


def _round(number: Number, digits: Number = 0) -> Number:
    if not isinstance(digits, int) or abs(digits) > 50:
        raise CalculatorError("round takes at most 50 digits, a whole number")
    return round(number, digits) if digits else round(number)


_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: _product,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_CONSTANTS: dict[str, float] = {"pi": math.pi, "e": math.e}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "factorial": _factorial,
    "floor": math.floor,
    "gcd": math.gcd,
    "log": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "max": max,
    "min": min,
    "round": _round,
    "sin": math.sin,
    "sqrt": math.sqrt,
    "tan": math.tan,
}


def calculate(expression: str) -> Number:
    """The value of an arithmetic expression in Python's notation.

    Raises:
        CalculatorError: it has none, or is too large; the message is for the model.
    """
    text = expression.strip().lower()
    if len(text) > MAX_CHARACTERS:
        raise CalculatorError(f"the expression is longer than {MAX_CHARACTERS} characters")
    allowed = _ALLOWED.match(text)
    if allowed is not None and allowed.end() < len(text):
        hint = "; write ** for a power" if text[allowed.end()] == "^" else ""
        raise CalculatorError(f"{text[allowed.end()]!r} is not allowed{hint}")
    try:
        value = _evaluate(ast.parse(text, mode="eval").body)
        if not math.isfinite(value):
            raise CalculatorError("the result is too large")
    except CalculatorError:
        raise
    except ZeroDivisionError as error:
        raise CalculatorError("division by zero") from error
    except OverflowError as error:
        raise CalculatorError("the result is too large") from error
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise CalculatorError("this is not one arithmetic expression") from error
    except (TypeError, ValueError) as error:
        raise CalculatorError(str(error)) from error
    return value


def _evaluate(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=operation, operand=operand) if type(operation) in _UNARY:
            return _UNARY[type(operation)](_evaluate(operand))
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _BINARY:
            return _BINARY[type(operation)](_evaluate(left), _evaluate(right))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_evaluate(argument) for argument in arguments))
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
            names = ", ".join([*_FUNCTIONS, *_CONSTANTS])
            raise CalculatorError(f"{name!r} is unknown here; there are {names}")
    raise CalculatorError("only numbers, + - * / // % **, parentheses and functions are allowed")


def _bounded(value: Number) -> Number:
    if isinstance(value, int):
        _check_bits(value.bit_length())
    return value


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise CalculatorError("a number is too large")


def format_number(value: Number, max_characters: int) -> str:
    """Whole numbers in full where they fit, others with twelve significant digits."""
    text = str(value) if isinstance(value, int) else ""
    return text if 0 < len(text) <= max_characters else f"{value:.12g}"


def calculator_schema() -> ToolSchema:
    """The schema of the tool, for those who only show it."""
    return function_schema(
        Calculator.name,
        "Evaluates one arithmetic expression.",
        {"expression": "The expression in Python's notation, for example (3 + 4) * sqrt(2)."},
    )


class Calculator:
    """The tool. It needs no sandbox and keeps nothing."""

    name = "calculator"

    def __init__(self, *, max_characters: int = 256) -> None:
        """Whole numbers of more characters are shown rounded."""
        self._max_characters = max_characters

    @property
    def schema(self) -> ToolSchema:
        """The function schema as shown to the model."""
        return calculator_schema()

    async def call(self, arguments: Mapping[str, object]) -> ToolResult:
        """Evaluate `arguments["expression"]`."""
        expression = arguments.get("expression")
        if not isinstance(expression, str):
            return ToolResult("Error: give one argument, `expression`, a string.", succeeded=False)
        try:
            text = format_number(calculate(expression), self._max_characters)
            return ToolResult(text, succeeded=True)
        except CalculatorError as error:
            return ToolResult(f"Error: {error}.", succeeded=False)
