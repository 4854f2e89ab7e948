"""The grader of multiple-choice answers."""

import pytest

from sod_mcore.rewards.choice import choice


@pytest.mark.parametrize(
    "box",
    [
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


@pytest.mark.parametrize("box", ["A dog", "Because", "4 eV", "A, B", "AB", "Z", "-", "(B", "1"])
def test_a_box_without_an_option(box: str) -> None:
    assert choice(f"\\boxed{{{box}}}", "B", {}).category == "bad_format"


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("It is B", "no_answer"),
        ("", "no_answer"),
        ("\\boxed{}", "no_answer"),
        ("\\boxed{B", "bad_format"),
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
