"""Evaluation questions found again in training data, however they are written."""

from __future__ import annotations

import pytest

from sod_mcore.data import OverlapError, assert_disjoint, normalized_question


@pytest.mark.parametrize(
    "variant",
    ["calculate 1 + 2", "  Calculate  1+2 .", "Calculate\n1 + 2?", "Calculate １ + ２."],
)
def test_the_same_question_in_other_spelling(variant: str) -> None:
    assert normalized_question(variant) == normalized_question("Calculate 1 + 2.")
    with pytest.raises(OverlapError, match=r"1 of 1 .*'teacher'"):
        assert_disjoint({"student": ["x"], "teacher": ["y", variant]}, ["Calculate 1 + 2."])


@pytest.mark.parametrize("other", ["Calculate 1 - 2.", "Calculate 1 + 3.", "Calculate (1 + 2)."])
def test_other_questions_pass(other: str) -> None:
    assert_disjoint({"train": [other]}, ["Calculate 1 + 2."])
