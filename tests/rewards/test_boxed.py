"""Extraction of boxed answers, and what is the matter where there is none."""

import pytest

from sod_mcore.rewards import extract_last_boxed
from sod_mcore.rewards.boxed import LONGEST_ANSWER, BoxedAnswer, read_boxed_answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{ 12}", " 12"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}.", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{3}}", "3"),
        ("\\boxed{1\n2}", "1\n2"),
        ("no box", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed {5}", "5"),
        ("\\boxed{4}, \\boxed\n{5}", "5"),
        (r"\boxed{4} by the \boxed command", "4"),
        ("\\boxed{2\\", None),
        ("", None),
    ],
)
def test_extract_last_boxed(text: str, content: str | None) -> None:
    assert extract_last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{ 12 }", BoxedAnswer("12")),
        ("12", BoxedAnswer("", "no_answer")),
        (r"\boxed{ }", BoxedAnswer("", "no_answer")),
        (r"\boxed{12", BoxedAnswer("", "bad_format")),
        (r"\boxed {12", BoxedAnswer("", "bad_format")),
        (r"<think>\boxed{11}</think>\boxed{12}", BoxedAnswer("12")),
        (r"<think>\boxed{11}</think>It is 12.", BoxedAnswer("", "no_answer")),
        (r"<think>\boxed{11}", BoxedAnswer("", "no_answer")),
        (r"\boxed{11}</think>It is 12.", BoxedAnswer("", "no_answer")),
        (rf"\boxed{{{'1' * LONGEST_ANSWER}}}", BoxedAnswer("1" * LONGEST_ANSWER)),
        (rf"\boxed{{{'1' * 5000}}}", BoxedAnswer("1" * LONGEST_ANSWER, "bad_format")),
    ],
)
def test_read_boxed_answer(text: str, answer: BoxedAnswer) -> None:
    assert read_boxed_answer(text) == answer
