r"""The default grader on all answers of AIME 2024 and 2025, and against another project's grader.

The problems and the grader are those of sgl-eval, which took them from NVIDIA's NeMo-Skills.
"""

import json
from importlib import resources

import pytest
from sgl_eval._vendored.nemo_skills.math_grader import extract_answer, math_equal

from sod_mcore.rewards.math_answers import math_verify_grader

RIGHT_SPELLINGS = (
    "{n}", "{n:03d}", "{n}.0", " {n} ", "'{n}'", "${n}$", "x = {n}", "{n} apples", "{n} cm",
    r"\text{{{n}}}", r"\mathbf{{{n}}}", r"{n}^\circ", r"{n}\,", r"{n}\\", r"\left({n}\right)",
    r"\frac{{{twice}}}{{2}}", r"\dfrac{{{twice}}}{{2}}", "{twice}/2", "{before} + 1",
    r"\binom{{{n}}}{{1}}",
)  # fmt: skip
WRONG_SPELLINGS = (
    "{after}", "{after:03d}", "-{n}.5", "{n}.01", "{n}.000001", r"\frac{{{n}}}{{1001}} + 1",
    "{n} + x", "{n}, {after}", "{n} or {after}", r"\pm {after}",
)  # fmt: skip

DISAGREEMENTS = (
    # answer, truth, ours, theirs: why
    ("73e0", "73", "right", False),  # they read e as Euler's number
    ("100000", "1e5", "right", False),
    ("73**1", "73", "right", False),  # Python's power
    ("x**2", "x^2", "right", False),
    (r"\approx 73", "73", "right", False),  # extracted as plain text by math-verify
    ("73°", "73", "right", False),
    ("0.5", r"50\%", "right", False),  # they drop the sign from the right answer
    ("5 cm", "5 m", "wrong", True),  # they drop units
    ("0.00000034", "0.00000012", "wrong", True),  # they round to six decimal places
    ("true", "True", "right", False),  # they distinguish capitals
    ("nucleus", "the nucleus", "right", False),
)


def answers(year: int) -> list[int]:
    """The thirty right answers of a year."""
    folder = resources.files("sgl_eval") / "_vendored/nemo_skills/dataset" / f"aime{year}"
    rows = (folder / "test.txt").read_text().splitlines()
    return [int(json.loads(row)["expected_answer"]) for row in rows]


def spell(spelling: str, n: int) -> str:
    """A response with a boxed spelling of a number."""
    content = spelling.format(n=n, twice=2 * n, before=n - 1, after=n + 1)
    return f"Therefore the answer is \\boxed{{{content}}}."


@pytest.mark.parametrize("year", [24, 25])
def test_there_are_thirty_answers_a_year(year: int) -> None:
    numbers = answers(year)
    assert len(numbers) == 30
    assert all(0 <= number <= 999 for number in numbers)


@pytest.mark.parametrize("year", [24, 25])
@pytest.mark.parametrize("spelling", RIGHT_SPELLINGS + WRONG_SPELLINGS)
def test_every_answer_in_several_spellings(spelling: str, year: int) -> None:
    is_right = spelling in RIGHT_SPELLINGS
    for number in answers(year):
        response = spell(spelling, number)
        verdict = math_verify_grader(response, str(number), {})
        assert (verdict.category == "right") == is_right, response
        assert math_equal(str(number), extract_answer(response)) == is_right, response


@pytest.mark.parametrize(("answer", "truth", "ours", "theirs"), DISAGREEMENTS)
def test_where_the_graders_disagree(answer: str, truth: str, ours: str, theirs: bool) -> None:
    """Each case is meant: the comment beside it says why theirs differs."""
    assert math_verify_grader(f"\\boxed{{{answer}}}", truth, {}).category == ours
    assert math_equal(truth, answer) == theirs
