"""The grader of multiple-choice answers."""

import pytest

from sod_mcore.rewards.choice import choice


@pytest.mark.parametrize(
    "box",
    [
        *("Option B", "Option: B", r"\text{Option B}", "Choice B", "Answer: B", "Answer:B"),
        *("The correct answer is (B)", r"\textbf{Answer: } B", r"\text{Option } \mathbf{B}"),
        *("{B}", "[B]", "B,", "**B**", "`B`", r"\quad B", r"B\,", r"B\\", r"\left(B\right)"),
        *(r"\boldsymbol{B}", r"\mathcal{B}", r"\textsf{B}", r"\underline{B}", r"(\text{B})"),
        *(r"\text{\textbf{B}}", "B - 12 m", r"B \text{ text}", "B is correct"),
        *("B is the correct answer.", "B. 2 A", "B. I and II only", "(B) A dog", "B. f(a) = 2"),
        *("(b) f(A)", "(B) text, so (B)", "B, 12 m"),
        *("B", " B ", "b", "(B)", "(b)", "B.", "B)", "B:", "'B'", "$B$"),
        *(r"\text{B}", r"\text{(B)}", r"\mathbf{B}", r"\textbf{(B) 4 eV}"),
        *(
            "B. the ground state",
            r"(B)\ 4",
            r"\text{B. the ground state}",
            r"\text{B}. 4 \text{eV}",
        ),
    ],
)
def test_spellings_of_an_option(box: str) -> None:
    verdict = choice(f"I think \\boxed{{{box}}}.", "B", {})
    assert (verdict.category, verdict.prediction) == ("right", "B")
    assert choice(f"\\boxed{{{box}}}", "c", {}).category == "wrong"


@pytest.mark.parametrize(
    "box",
    [
        *("A dog", "Because", "4 eV", "A, B", "AB", "Z", "-", "(B", "1", "Option", "not B"),
        *("(B) or (C)", "(b) or (c)", "(B)(C)", "(B)/(C)", "B (C)", "(B) and C", "B and C"),
        *("B. C. D. A.", "B, C", "b, c", "B,C,D", "B; C", "[B, C]", "B or C", "B/C", "B) C)"),
        *(r"\text{B} \text{ or } \text{C}", "A is wrong, B is right", "B is not correct"),
        *("B = 12", "B_1", "A-frame"),
    ],
)
def test_a_box_without_an_option(box: str) -> None:
    assert choice(f"\\boxed{{{box}}}", "B", {}).category == "bad_format"


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("It is B", "no_answer"),
        ("", "no_answer"),
        ("\\boxed{}", "no_answer"),
        ("\\boxed{B", "bad_format"),
        ("<think>\\boxed{B}</think>It is B.", "no_answer"),
        ("<think>\\boxed{C}</think>\\boxed{B}", "right"),
    ],
)
def test_no_box(text: str, category: str) -> None:
    assert choice(text, "B", {}).category == category


def test_the_last_box_counts() -> None:
    assert choice("\\boxed{B}, no, \\boxed{C}", "B", {}).category == "wrong"


@pytest.mark.parametrize("truth", ["", "AB", "4", "K"])
def test_a_row_without_a_letter(truth: str) -> None:
    with pytest.raises(ValueError, match=f"ground_truth = '{truth}'.*one letter"):
        choice("\\boxed{B}", truth, {})
