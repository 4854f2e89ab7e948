r"""Units in several spellings, and what is none."""

import pytest

from sod_mcore.rewards.plain_numbers import read_quantity
from sod_mcore.rewards.units import read_unit


@pytest.mark.parametrize(
    ("unit", "spellings"),
    [
        ("m^1", ["m", "meter", "meters", "metre", "metres", "Meters", r"\text{m}", r"\mathrm{~m}"]),
        ("kg^1", ["kg", "kilogram", "kilograms", "kilogrammes", "kgs"]),
        ("mL^1", ["mL", "ml", "milliliters", "millilitre"]),
        ("µm^1", ["µm", "um", r"\mu m", "micrometers", "micrometre", "\u03bcm"]),
        ("eV^1", ["eV", "electron volts", "electronvolt", "electron-volts"]),
        ("MeV^1", ["MeV", "megaelectronvolts"]),
        ("min^1", ["min", "mins", "minute", "minutes"]),
        ("h^1", ["h", "hr", "hrs", "hour", "hours"]),
        ("deg^1", ["deg", "degree", "degrees", r"^\circ", r"^{\circ}", "°"]),
        ("C^1 deg^1", ["°C", r"^\circ C", r"^{\circ}\text{C}", "degrees Celsius"]),
        ("m^1 s^-1", ["m/s", "m s^{-1}", "m s-1", r"m\cdot s^{-1}", "meters per second"]),
        ("m^1 s^-2", ["m/s^2", r"\mathrm{m\,s^{-2}}", r"\text{ m/s}^2", "m·s⁻²", "m/s/s"]),
        ("m^1 s^-2", [r"\frac{\text{m}}{\text{s}^2}", "metres per second squared"]),
        ("m^2", ["m^2", "m²", "m2", "square meters", "sq m", "meters squared"]),
        ("cm^3", ["cm^3", "cubic centimeters", r"\text{cm}^{3}"]),
        ("J^1 K^-1 mol^-1", ["J/(mol K)", r"J/mol\cdot K", r"J\,mol^{-1}\,K^{-1}", "J/mol/K"]),
        ("h^1 kW^1", ["kWh", "kW h", "kilowatt-hours", "kW·h"]),
        ("in^1", ["in", "inch", "inches"]),
        ("ft^1", ["ft", "foot", "feet"]),
        ("box^1", ["box", "boxes"]),
        ("apple^1", ["apple", "apples", "Apples"]),
        ("%", ["%", r"\%", "percent", "per cent", "Percent"]),
    ],
)
def test_spellings_of_one_unit(unit: str, spellings: list[str]) -> None:
    read = {spelling: read_quantity(f"5 {spelling}") for spelling in spellings}
    assert {spelling: number and number.unit for spelling, number in read.items()} == (
        dict.fromkeys(spellings, unit)
    )


@pytest.mark.parametrize(
    "text",
    [
        *("squared", "minus 3", "choose 2", "factorial", "over 2", "mod 3", "times", "halves"),
        *("m - 3", "m 2", "m + s", "m/", "m per", "m^", "(m)^2", "^2", "/", "square", "square /"),
        *("x", "kT", "", "max", "\\pi"),
    ],
)
def test_what_is_no_unit(text: str) -> None:
    assert read_unit(text) is None
