r"""Numbers with or without a unit, compared exactly: "1,200", "\frac{84}{2}", "1.6e-19 C", "50\%".

math-verify rounds to six decimal places, so 1.6e-19 equals 9.1e-31 there; it reads "1e5" as 5 times
Euler's number, and it drops units, so that 5 m equals 5 cm (0.9.0). What is a plain number on both
sides is therefore compared here, and only the rest there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Final

from sod_mcore.rewards.boxed import LONGEST_ANSWER
from sod_mcore.rewards.units import read_unit

RELATIVE_TOLERANCE = Fraction(1, 10**6)
"""Between a decimal number and a right answer that is not an integer: 0.333333 is 1/3."""

_SPELLINGS = (
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|!)"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;: ]|~|\s+"), " "),
    (re.compile(r"\\?\$|\\[()\[\]]"), ""),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\times|\\cdot|[×·]"), "*"),
    (re.compile(r"\s*(?:(?:\{\s*\})?\^\s*\{?\s*\\circ\s*\}?|°|\\degree)\s*"), " deg "),
    (re.compile(r"[−–]"), "-"),
)
_DECIMAL = r"(?:(?:\d{1,3}(?:[ ,]\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"
_QUANTITY = re.compile(
    rf"""(?P<sign>[+-]?)\s*
    (?:
        \\frac\s*\{{\s*(?P<top>[+-]?{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>{_DECIMAL})\s*\}}
      | \\frac\s*(?P<top_digit>\d)\s*(?P<bottom_digit>\d)
      | (?P<whole>\d+)\s+(?P<over>\d+)\s*/\s*(?P<under>\d+)
      | (?P<numerator>\d+)\s*/\s*(?P<denominator>\d+)
      | (?P<decimal>{_DECIMAL})
        (?:[eE](?P<e>[+-]?\d{{1,3}})|\s*[*x]\s*10\s*\^\s*\{{?\s*(?P<power>[+-]?\d{{1,3}})\s*\}}?)?
    )
    (?P<unit>.*)""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)
_IN_BRACES = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_WRAPPED = re.compile(r"\\(?:text|textrm|textbf|mathrm|operatorname|mbox|rm)\s*" + _IN_BRACES)
_FRACTION = re.compile(rf"\\frac\s*{_IN_BRACES}\s*{_IN_BRACES}")
_PERCENT = re.compile("%|percent|per cent", re.IGNORECASE)
_NUMBER_WORD = re.compile(
    r"\s*(hundred|thousand|million|billion|trillion|dozen)s?\b", re.IGNORECASE
)
_NUMBER_WORDS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6,
        "billion": 10**9, "trillion": 10**12,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """A number and its unit: "" without one, "%" for per cent."""

    value: Fraction
    unit: str


def read_quantity(text: str) -> Quantity | None:
    """The number that a text consists of, with its unit; None if the text is anything else."""
    if len(text) > LONGEST_ANSWER:
        return None
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    match = _QUANTITY.fullmatch(text.strip().rstrip("."))
    value = None if match is None else _read_value(match)
    if match is None or value is None:
        return None
    factor, rest = _read_number_words(_without_wrappers(match["unit"]))
    unit = _read_unit(rest)
    return None if unit is None else Quantity(value * factor, unit)


def is_same_quantity(answer: Quantity, truth: Quantity) -> bool:
    """Whether the numbers are equal, and the units too where both have one.

    Nothing is converted, beside per cent: 50 % is 0.5 and also a bare 50, for questions that ask
    for a percentage. Where the right answer is a bare 0.5, 0.5 % is wrong.
    """
    if answer.unit and truth.unit and answer.unit != truth.unit:
        return False
    if _is_close(answer.value, truth.value):
        return answer.unit != "%" or truth.unit == "%" or not 0 < abs(truth.value) < 1
    is_only_one_percentage = (answer.unit == "%") != (truth.unit == "%")
    hundredth = Fraction(1, 100)
    return is_only_one_percentage and _is_close(
        answer.value * (hundredth if answer.unit == "%" else 1),
        truth.value * (hundredth if truth.unit == "%" else 1),
    )


def _is_close(answer: Fraction, truth: Fraction) -> bool:
    if truth.denominator == 1:
        return answer == truth
    return abs(answer - truth) <= RELATIVE_TOLERANCE * abs(truth)


def _read_value(match: re.Match[str]) -> Fraction | None:
    named = match.groupdict()
    tops, bottoms = (
        ("top", "top_digit", "numerator", "over", "decimal"),
        ("bottom", "bottom_digit", "denominator", "under"),
    )
    top = next(named[name] for name in tops if named[name])
    bottom = next((named[name] for name in bottoms if named[name]), "1")
    divisor = _fraction(bottom)
    if divisor == 0:
        return None
    power = int(match["e"] or match["power"] or 0)
    value = int(match["whole"] or 0) + _fraction(top) / divisor * Fraction(10) ** power
    return -value if match["sign"] == "-" else value


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))


def _without_wrappers(text: str) -> str:
    r"""The text behind a number, without `\text`; what was in it is set off by a space.

    Only with `\text` is a fraction one of units: `5\frac{x}{y}` is a product.
    """
    plain = _WRAPPED.sub(r" \1", text)
    return plain if plain == text else _FRACTION.sub(r" \1/(\2)", plain)


def _read_number_words(text: str) -> tuple[Fraction, str]:
    """What "hundred thousand" at the beginning of a text multiplies by, and the rest."""
    factor = Fraction(1)
    while match := _NUMBER_WORD.match(text):
        factor *= _NUMBER_WORDS[match[1].lower()]
        text = text[match.end() :]
    return factor, text


def _read_unit(text: str) -> str | None:
    """The unit behind a number, in its one spelling; None if what stands there is none.

    A unit is set off by a space: "5 m" is a length, "5m" a product, as is "5 x".
    """
    if not text.strip():
        return ""
    if _PERCENT.fullmatch(text.strip()):
        return "%"
    return read_unit(text) if text[0] == " " else None
