r"""Graders of mathematical answers: by value, and by the reference's text (vectors M1, M2)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sod_mcore.rewards.answer_text import is_words, normalised_words, unwrap, without_spacing
from sod_mcore.rewards.choice import choice
from sod_mcore.rewards.interface import Category, Verdict
from sod_mcore.rewards.math_answers import math_verify_grader, strict_box
from sod_mcore.rewards.minerva import minerva, normalised_answer
from sod_mcore.rewards.plain_numbers import is_same_quantity, read_quantity


def by_value(answer: str, truth: str) -> Category:
    """The category of an answer in a box."""
    return math_verify_grader(f"So it is \\boxed{{{answer}}}.", truth, {}).category


@pytest.mark.parametrize(
    ("truth", "answers"),
    [
        ("12", ["12", " 12 ", "012", "12.0", "12.", "'12'", '"12"', "‘12’", "$12$", r"\text{12}"]),
        ("12", [r"\frac{24}{2}", r"3 \cdot 4", "x = 12", r"\sqrt{144}", "1.2e1", r"1.2 \times 10"]),
        ("$12$", ["12"]),
        (r"\boxed{12}", ["12"]),
        (r"\(12\)", ["12"]),
        ("-5", ["-5", "−5", "- 5"]),
        ("1200", ["1,200", "1{,}200", r"1\,200", "1 200", r"\$1200", "1200.00"]),
        (r"\frac{1}{2}", [r"\frac12", r"\dfrac{1}{2}", "1/2", "0.5", ".5", r"50\%"]),
        (r"\frac{1}{3}", ["0.333333", "0.33333333", r"\frac{2}{6}"]),
        (r"50\%", ["0.5", "50", r"\frac{1}{2}", "50%"]),
        ("x+1", ["1+x", "x + 1", r"\frac{x^2-1}{x-1}"]),
        ("x^2", ["x**2", r"x \cdot x"]),
        (r"2\sqrt{2}", [r"\sqrt{8}", r"2 \sqrt 2", "2.8284271247"]),
        (r"(1, 2)", ["(1,2)", r"\left(1, 2\right)"]),
        (r"\{1, 2\}", ["1, 2", r"\{2, 1\}"]),
        (r"(-\infty, 3]", [r"(-\infty,3]"]),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"]),
        (r"90^\circ", ["90", r"90^{\circ}", "90 deg"]),
        ("y = 2x+1", ["2x+1", "y=1+2x"]),
        ("1.6e-19", [r"1.6 \times 10^{-19}", "1.6E-19", r"1.6\cdot10^{-19}"]),
        ("10^{-20}", [r"\frac{1}{10^{20}}"]),
        ("xyz+1", ["1+xyz", "1 + x y z"]),
        (r"\frac{abc}{4R}", ["abc/(4R)", r"\frac{abc}{4 R}", r"\frac{1}{4R} abc"]),
        (r"14\pi", ["14pi", "14 pi", "14π", "pi*14", r"7 \cdot 2 \pi"]),
        ("14pi", [r"14\pi"]),
        (r"2\sqrt{3}", ["2√3", "2√(3)", "√12"]),
        (r"\frac{3}{2}", ["1 1/2", r"1\frac{1}{2}"]),
        (r"-\frac{3}{2}", ["-1 1/2"]),
        ("(-1,1)", ["-1<x<1", r"x \in (-1,1)"]),
        (r"(-\infty,2]", [r"x\le 2", r"2 \ge x"]),
        ("73", [r"73\\", r"\quad 73", "**73**", "`73`", "{73}", "$$73$$", r"\[73\]"]),
        ("73", [r"\boldsymbol{73}", r"\underline{73}", r"73\ "]),
        ("3000000", ["3 million", r"3 \text{ million}", "3.0 Million"]),
        ("300", ["3 hundred", "25 dozen"]),
        ("200000", ["2 hundred thousand"]),
    ],
)
def test_spellings_of_one_value(truth: str, answers: list[str]) -> None:
    assert {answer: by_value(answer, truth) for answer in answers} == dict.fromkeys(
        answers, "right"
    )


@pytest.mark.parametrize(
    ("truth", "answers"),
    [
        ("12", ["13", "-12", "12.1", "11.9999999", "twelve", "x", "1, 2", "12x"]),
        ("123456789", ["123456790", "123456789.1"]),
        (r"\frac{1}{3}", ["0.333", "0.3", r"\frac{1}{4}"]),
        ("x+1", ["x", "x-1", "y+1"]),
        ("5x", ["5", "x"]),
        ("5 x", ["5"]),
        ("(1, 2)", ["(2, 1)", "(1, 3)"]),
        ("0.5", ["5"]),
        (r"50\%", [r"5\%", r"0.5\%"]),
        # What math-verify 0.9.0 alone takes for equal:
        ("1.6e-19", ["9.1e-31", "0", r"9.1 \times 10^{-31}"]),
        (r"10^{-20}\pi", [r"10^{-30}\pi"]),
        ("5 m", ["5 cm"]),
        ("tea", ["eat"]),
        ("1e5", ["e+5", "5e"]),
        ("3", ["3 million", "3 hundred", "3 choose 1", "3 factorial", "3 over 2", "3 halves"]),
        ("5", ["5 thousand", "5 minus 3", "5 plus 3", "5 times 3", "5 squared", "5 mod 3"]),
        ("2", ["2 dozen", "2 cubed", "2 divided by 3", "2 billion"]),
        ("1", ["1 1/2"]),
        ("0.5", [r"0.5\%", "0.5 percent"]),
        ("xyz+1", ["xyz", "1-xyz", "zzz+1"]),
        (r"\frac{abc}{4R}", ["abc/4", "abc", "abd/(4R)"]),
        (r"14\pi", ["14", "14 pies", "41pi"]),
        ("2-methylbutane", ["2-butanemethyl", "3-methylbutane"]),
        ("man bites dog", ["dog bites man"]),
        ("dog - man bites + 1", ["man - dog bites + 1"]),
        ("(-1,1)", ["-1<x<2", r"-1 \le x < 1"]),
    ],
)
def test_other_values(truth: str, answers: list[str]) -> None:
    assert {answer: by_value(answer, truth) for answer in answers} == dict.fromkeys(
        answers, "wrong"
    )


@pytest.mark.parametrize(
    ("truth", "right", "wrong"),
    [
        ("0.0833 M", ["0.0833", r"0.0833\ \text{M}", "0.08330 M"], ["0.0834", "0.0833 m"]),
        ("-393.5 kJ/mol", ["-393.5", r"-393.5\text{ kJ/mol}"], ["393.5", "-393.5 kJ"]),
        (r"2.5 \times 10^{-3} mol", ["0.0025", "2.5e-3 mol"], ["2.5"]),
        (r"9.8 \text{ m/s}^2", ["9.8", "9.8 m/s^2", r"9.8\,\mathrm{m/s^2}"], ["9.8 m/s"]),
        ("5 m", ["5 meters", "5 metre", r"5\text{ m}"], ["5 kilometers", "5 feet", "5 million m"]),
        ("5 meters", ["5 m", "5"], ["5 cm"]),
        ("5 kg", ["5 kilograms", r"5\,\mathrm{kg}"], ["5 g", "5000 g"]),
        (r"30^\circ", ["30 degrees", "30 deg", "30°"], ["30 radians", "31 degrees"]),
        ("9.8 m/s^2", [r"9.8 \mathrm{m\,s^{-2}}", "9.8 meters per second squared"], ["9.8 m s"]),
        ("3 million dollars", ["3000000 dollars", "3 million"], ["3", "3 dollars"]),
        ("12 apples", ["12", "12 apple", r"12\text{ apples}"], ["12 pears", "11 apples"]),
        ("hydrogen bonding", ["Hydrogen bonding.", r"\text{hydrogen bonding}"], ["bonding"]),
        ("the nucleus", ["nucleus", r"\text{The nucleus}", "'nucleus'"], ["the cell"]),
        ("True", ["true", r"\text{True}"], ["false", "eurT"]),
        ("NaCl", ["NaCl", r"\mathrm{NaCl}"], ["KCl"]),
    ],
)
def test_units_and_words(truth: str, right: list[str], wrong: list[str]) -> None:
    categories = {answer: by_value(answer, truth) for answer in right + wrong}
    assert categories == dict.fromkeys(right, "right") | dict.fromkeys(wrong, "wrong")


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("The answer is 12.", Verdict("no_answer")),
        ("", Verdict("no_answer")),
        (r"\boxed{}", Verdict("no_answer")),
        (r"\boxed{\frac{1}{2}", Verdict("bad_format")),
        (r"\boxed{\frac{1}}", Verdict("bad_format", r"\frac{1}")),
        (
            r"\boxed{" + 21 * "(" + "12" + 21 * ")" + "}",
            Verdict("bad_format", 21 * "(" + "12" + 21 * ")"),
        ),
        (r"\boxed{+*}", Verdict("bad_format", "+*")),
        (r"\boxed{12} or \boxed{13}", Verdict("wrong", "13")),
        (r"<think>\boxed{12}</think>It is 12.", Verdict("no_answer")),
        (r"<think>\boxed{13}</think>\boxed{12}", Verdict("right", "12")),
        (r"\boxed {12}", Verdict("right", "12")),
        (r"\boxed{'12'}", Verdict("right", "12")),
    ],
)
def test_categories_and_predictions(response: str, verdict: Verdict) -> None:
    assert math_verify_grader(response, "12", {}) == verdict


@pytest.mark.parametrize("truth", ["", "  ", "$ $", r"\boxed{}"])
def test_a_row_without_an_answer(truth: str) -> None:
    with pytest.raises(ValueError, match=r"ground_truth = .*a mathematical answer is needed"):
        math_verify_grader(r"\boxed{12}", truth, {})


@pytest.mark.parametrize(
    ("response", "truth", "verdict"),
    [
        (r"so \boxed{12}", "12", Verdict("right", "12")),
        (r"\boxed{ 12}", "12", Verdict("wrong", " 12")),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", Verdict("right", r"\frac{1}{2}")),
        (r"\boxed{12}" + 90 * ".", "12", Verdict("right", "12")),
        (r"\boxed{12}" + 91 * ".", "12", Verdict("no_answer")),
        (r"\boxed{'12'}", "12", Verdict("wrong", "'12'")),
        (r"\boxed{11} \boxed{12}", "12", Verdict("right", "12")),
        (r"\boxed{12} \boxed{11}", "12", Verdict("wrong", "11")),
        ("12", "12", Verdict("no_answer")),
        (r"\boxed{12", "12", Verdict("bad_format")),
        (r"\boxed{12.0}", "12", Verdict("wrong", "12.0")),
        (r"\boxed{\{1\}", r"\{1\}", Verdict("bad_format")),
    ],
)
def test_strict_box_is_the_references_rule(response: str, truth: str, verdict: Verdict) -> None:
    """Vector M1, and its other quirks."""
    assert strict_box(response, truth, {}) == verdict


@pytest.mark.parametrize(
    ("response", "truth", "category"),
    [
        ("Answer: $12$", "12", "right"),
        ("Answer: 1,200 dollars", "1200", "right"),
        (r"answer: \frac12", r"\frac{1}{2}", "right"),
        ("Answer: 12\nAnswer: 13", "13", "right"),
        (r"Answer: \boxed{12}", "12", "right"),
        (r"Answer: x = \sqrt2 \text{ cm}", r"\sqrt{2}", "right"),
        ("Answer: 13", "12", "wrong"),
        ("Answer: 12" + 300 * ".", "12", "no_answer"),
        (r"\boxed{12}", "12", "no_answer"),
    ],
)
def test_minerva_is_the_references_other_rule(
    response: str, truth: str, category: Category
) -> None:
    """Vector M2, and its window of 300 characters."""
    assert minerva(response, truth, {}).category == category


def test_minerva_cuts_words_as_the_reference_does() -> None:
    assert normalised_answer("a banana split") == "banansplit"


PIECES = (
    r"\frac", r"\text{", r"\mathrm{", r"\times", r"\circ", r"\left(", r"\,", r"\%", r"\boxed{", "$",
    "10^{", "^", "{", "}", "(", ")", "'", '"', "`", ",", ".", ";", "-", "+", "/", "*", "%",
    "pi", "√", "**", "\\\\", r"\quad", "million", "squared", "Option", "per",
    "e", "x", "0", "1", "7", "12", ",000", "m/s", "cm", "apples", "A", "²", "٣", "µ", "°",
    " ", "\n", "\x00", "\ud800",
)  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_no_text_makes_the_own_stages_raise(answer: str) -> None:
    """A ValueError would call the data row unusable and stop the run."""
    quantity = read_quantity(answer)
    assert quantity is None or is_same_quantity(quantity, quantity)
    assert unwrap(unwrap(answer)) == unwrap(answer)
    is_words(answer), normalised_words(answer), without_spacing(answer)
    for grader in (strict_box, minerva, choice):
        grader(f"Answer: {answer} \\boxed{{{answer}}}", "A", {})
