r"""Numbers with or without a unit, compared exactly: "1,200", "\frac{84}{2}", "1.6e-19 C", "50\%".

math-verify rounds to six decimal places, so 1.6e-19 equals 9.1e-31 there; it reads "1e5" as 5 times
Euler's number, and it drops units, so that 5 m equals 5 cm (0.9.0). What is a plain number on both
sides is therefore compared here, and only the rest there.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from sod_mcore.rewards.boxed import LONGEST_ANSWER

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
    (re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°|\\degree)\s*"), " deg"),
    (re.compile(r"[−–]"), "-"),
)
_DECIMAL = r"(?:(?:\d{1,3}(?:[ ,]\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"
_QUANTITY = re.compile(
    rf"""(?P<sign>[+-]?)\s*
    (?:
        \\frac\s*\{{\s*(?P<top>[+-]?{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>{_DECIMAL})\s*\}}
      | \\frac\s*(?P<top_digit>\d)\s*(?P<bottom_digit>\d)
      | (?P<numerator>\d+)\s*/\s*(?P<denominator>\d+)
      | (?P<decimal>{_DECIMAL})
        (?:[eE](?P<e>[+-]?\d{{1,3}})|\s*[*x]\s*10\s*\^\s*\{{?\s*(?P<power>[+-]?\d{{1,3}})\s*\}}?)?
    )
    (?P<unit>.*)""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)
_WRAPPED_UNIT = re.compile(
    r"\s*\\(?:text|textrm|textbf|mathrm|operatorname)\s*\{(?P<unit>[^{}]*)\}"
)
_UNIT_SHAPE = re.compile(r"[A-Za-zµμΩÅ][A-Za-z0-9µμΩÅ/*^(){} .-]*")
_UNIT_WORD = re.compile(r"[A-Za-zµμΩÅ]+")
_SYMBOL = re.compile(
    "m|s|g|K|M|N|J|W|V|A|C|L|T|F|H|h|u|Å|Ω|cm|mm|km|nm|pm|dm|um|µm|μm|kg|mg|ng|mol|mmol|kmol"
    "|Hz|kHz|MHz|GHz|Pa|kPa|MPa|eV|keV|MeV|GeV|kJ|MJ|kN|kW|MW|mV|kV|mA|mL|dL|ms|ns|rad|deg|ppm|ppb"
    "|ft|in|mi|lb|oz|hr|yr|Bq|Ci|Gy|Sv|Wb|lm|lx|Da|kDa"
)
_NO_UNIT = re.compile(
    "and|arccos|arcsin|arctan|cos|cosh|cot|csc|det|exp|for|gcd|lcm|lim|log|max|min|mod|not|pmod"
    "|sec|sin|sinh|sqrt|tan|tanh"
)


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
    unit = None if match is None else _read_unit(match["unit"])
    value = None if match is None else _read_value(match)
    return None if unit is None or value is None else Quantity(value, unit)


def is_same_quantity(answer: Quantity, truth: Quantity) -> bool:
    """Whether the numbers are equal, and the units too where both have one.

    Nothing is converted, beside per cent: 50 % is 0.5 and also a bare 50, for questions that ask
    for a percentage.
    """
    if answer.unit and truth.unit and answer.unit != truth.unit:
        return False
    if _is_close(answer.value, truth.value):
        return True
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
    top = match["top"] or match["top_digit"] or match["numerator"] or match["decimal"]
    bottom = match["bottom"] or match["bottom_digit"] or match["denominator"] or "1"
    divisor = _fraction(bottom)
    if divisor == 0:
        return None
    power = int(match["e"] or match["power"] or 0)
    value = _fraction(top) / divisor * Fraction(10) ** power
    return -value if match["sign"] == "-" else value


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))


def _read_unit(text: str) -> str | None:
    r"""The unit behind a number, normalised; None if what stands there is none.

    A unit is set off by a space or by `\text`: "5 m" is a length, "5m" a product, as is "5 x".
    """
    if not text.strip():
        return ""
    if text.strip().lower() in ("%", "percent", "per cent"):
        return "%"
    is_set_off = text[0] == " " or _WRAPPED_UNIT.match(text) is not None
    plain = _WRAPPED_UNIT.sub(lambda match: " " + match["unit"], text).strip()
    if not is_set_off or not _UNIT_SHAPE.fullmatch(plain):
        return None
    words = _UNIT_WORD.findall(plain)
    if not all(_is_unit(word) for word in words):
        return None
    normalised = [w if _SYMBOL.fullmatch(w) else w.casefold().removesuffix("s") for w in words]
    rest = re.sub(r"[{} *]", "", _UNIT_WORD.sub("", plain))
    return " ".join([*normalised, rest]).strip()


def _is_unit(word: str) -> bool:
    """A known symbol, or any other word of three letters or more ("apples")."""
    return bool(_SYMBOL.fullmatch(word)) or (len(word) > 2 and not _NO_UNIT.fullmatch(word))
