r"""Units behind a number, in one spelling: "m/s^2", "m\,s^{-2}" and "metres per second squared".

Nothing is converted: a kilogram stays a kilogram, and a joule no newton metre.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Final

_SYMBOL = re.compile(
    "m|s|g|K|M|N|J|W|V|A|C|L|T|F|H|h|u|Å|Ω|cm|mm|km|nm|pm|fm|dm|µm|kg|mg|ng|µg|mol|mmol|kmol|µmol"
    "|Hz|kHz|MHz|GHz|Pa|kPa|MPa|eV|keV|MeV|GeV|kJ|MJ|mN|kN|kW|MW|mV|kV|mA|µA|mT|mH|nC|µC|pF|nF|µF"
    "|kΩ|mL|dL|µL|ms|µs|ns|ps|rad|sr|deg|ppm|ppb|ft|in|mi|lb|oz|min|yr|Bq|Ci|Gy|Sv|Wb|lm|lx|Da|kDa"
)
"""No name has all prefixes: "kT" is an energy and no kilotesla."""

_OTHER_SYMBOLS: Final[Mapping[str, str]] = MappingProxyType(
    {"um": "µm", "ug": "µg", "ml": "mL", "dl": "dL", "hr": "h", "sec": "s", "lbs": "lb"}
)
_PREFIXES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tera": "T", "giga": "G", "mega": "M", "kilo": "k", "hecto": "h", "deci": "d",
        "centi": "c", "milli": "m", "micro": "µ", "nano": "n", "pico": "p", "femto": "f",
    }
)  # fmt: skip
_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "meter": "m", "metre": "m", "gram": "g", "gramme": "g", "second": "s", "mole": "mol",
        "ampere": "A", "amp": "A", "kelvin": "K", "candela": "cd", "liter": "L", "litre": "L",
        "hertz": "Hz", "newton": "N", "pascal": "Pa", "joule": "J", "watt": "W", "volt": "V",
        "coulomb": "C", "farad": "F", "ohm": "Ω", "siemens": "S", "weber": "Wb", "tesla": "T",
        "henry": "H", "henrie": "H", "lumen": "lm", "lux": "lx", "becquerel": "Bq",
        "gray": "Gy", "sievert": "Sv", "electronvolt": "eV", "dalton": "Da", "radian": "rad",
    }
)  # fmt: skip
_NAMES_WITHOUT_PREFIX: Final[Mapping[str, str]] = MappingProxyType(
    {
        "minute": "min", "hour": "h", "year": "yr", "degree": "deg", "celsius": "C",
        "centigrade": "C", "fahrenheit": "F", "steradian": "sr", "angstrom": "Å", "foot": "ft",
        "feet": "ft", "inch": "in", "inche": "in", "mile": "mi", "pound": "lb", "ounce": "oz",
        "kilohm": "kΩ",
    }
)  # fmt: skip
_NO_UNIT = re.compile(
    "and|arccos|arcsin|arctan|choose|cos|cosh|cot|csc|cubed|det|divided|dozen|exp|factorial|for|gcd"
    "|half|halves|thirds?|fourths?|fifths?|sixths?|eighths?|ninths?|tenths?|(?:hundred|thousand"
    "|million|billion|trillion)(?:th)?s?|lcm|less|lim|log|max|minus|mod|modulo|multiplied|not|over"
    "|percent|plus|pmod|power|raised|root|sec|sin|sinh|sqrt|squared|tan|tanh|times",
    re.IGNORECASE,
)
_POWER_BEFORE: Final[Mapping[str, int]] = MappingProxyType({"square": 2, "sq": 2, "cubic": 3})
_POWER_BEHIND: Final[Mapping[str, int]] = MappingProxyType({"squared": 2, "cubed": 3})
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SPELLINGS = (
    (re.compile(r"\\mu(?![A-Za-z])\s*|μ"), "µ"),
    (re.compile(r"\\Omega(?![A-Za-z])"), "Ω"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?i)electron[ -]volt"), "electronvolt"),
    (re.compile("(?i)kWh"), "kW h"),
)
_TOKEN = re.compile(
    r"""(?P<word>[A-Za-zµΩÅ]+)
        (?:(?P<digits>-?\d{1,3}) | \s*\^\s*[{(]*\s*(?P<power>[+-]?\d{1,3}(?:/[1-9])?)\s*[)}]*
        | \s+(?P<power_word>squared|cubed)\b)?
    |(?P<slash>/)
    |[\s.*(){}-]""",
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)


def read_unit(text: str) -> str | None:
    """The unit that a text consists of, in its one spelling; None if the text is anything else.

    What stands behind a slash or "per" divides, with or without parentheses: J/mol K, J/(mol K).
    Any word of three letters or more is a unit ("apples"), unless it says what to calculate.
    """
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    powers = _read_powers(text)
    if not powers:
        return None
    return " ".join(f"{symbol}^{powers[symbol]}" for symbol in sorted(powers))


def _read_powers(text: str) -> dict[str, Fraction] | None:
    """The power of each symbol; None if the text holds anything but units."""
    powers: dict[str, Fraction] = {}
    sign, power_before, position = 1, 1, 0
    awaits_unit = False
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            return None
        position = token.end()
        word = token["word"] or ""
        if token["slash"] or word.casefold() == "per":
            sign, awaits_unit = -1, True
        elif word.casefold() in _POWER_BEFORE:
            power_before, awaits_unit = _POWER_BEFORE[word.casefold()], True
        elif word:
            symbol = _read_symbol(word)
            if symbol is None:
                return None
            power = sign * power_before * _read_power(token)
            powers[symbol] = powers.get(symbol, Fraction(0)) + power
            power_before, awaits_unit = 1, False
    return None if awaits_unit else powers


def _read_power(token: re.Match[str]) -> Fraction:
    if token["power_word"]:
        return Fraction(_POWER_BEHIND[token["power_word"].casefold()])
    return Fraction(token["digits"] or token["power"] or 1)


def _read_symbol(word: str) -> str | None:
    """The one spelling of a word: a known symbol, or a name in the singular."""
    for spelling in (word, word.removesuffix("s")):
        if _SYMBOL.fullmatch(spelling) and (len(spelling) > 1 or spelling == word):
            return spelling
        if spelling in _OTHER_SYMBOLS:
            return _OTHER_SYMBOLS[spelling]
    if len(word) < 3 or _NO_UNIT.fullmatch(word):
        return None
    lower = word.casefold()
    return _symbol_of_name(lower) or _symbol_of_name(lower.removesuffix("s")) or _singular(lower)


def _symbol_of_name(name: str) -> str | None:
    if name in _NAMES_WITHOUT_PREFIX:
        return _NAMES_WITHOUT_PREFIX[name]
    if name in _NAMES:
        return _NAMES[name]
    for prefix, letter in _PREFIXES.items():
        base = name.removeprefix(prefix)
        if base != name and base in _NAMES:
            return letter + _NAMES[base]
    return None


def _singular(word: str) -> str:
    if re.search("(?:s|x|ch|sh)es$", word):
        return word.removesuffix("es")
    return word.removesuffix("s")
