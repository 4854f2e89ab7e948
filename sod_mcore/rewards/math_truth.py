r"""The right answer of a mathematical row, read and checked without sympy, which takes a while."""

import re
from collections.abc import Mapping

from sod_mcore.rewards.answer_text import is_words, unwrap
from sod_mcore.rewards.boxed import LONGEST_ANSWER, nesting_depth, read_boxed_answer
from sod_mcore.rewards.plain_numbers import read_quantity

DEEPEST_NESTING = 20
"""math-verify takes seconds over 15 braces within each other, and minutes over hundreds."""

_ESCAPED = re.compile(r"\\.", re.DOTALL)


def read_truth(ground_truth: str) -> str:
    """The right answer without a box, quotes or dollar signs around it.

    Raises:
        ValueError: it is empty.
    """
    box = read_boxed_answer(ground_truth)
    truth = unwrap(ground_truth if box.problem else box.text)
    is_empty_box = box.problem is not None and r"\boxed" in truth
    if is_empty_box or not truth.strip("$ "):
        raise _unusable(ground_truth)
    return truth


def check_truth(ground_truth: str, extra_info: Mapping[str, object]) -> None:
    """Refuse a row that no answer by value could be right for.

    Raises:
        ValueError: the right answer is empty, or neither a number, nor words, nor an expression
            with its braces closed.
    """
    truth = read_truth(ground_truth)
    if read_quantity(truth) or len(truth) > LONGEST_ANSWER or is_words(truth):
        return
    has_value = any(character.isalnum() or character in "∞∅" for character in truth)
    if not has_value or not _closes_its_braces(truth) or nesting_depth(truth) > DEEPEST_NESTING:
        raise _unusable(ground_truth)


def check_text(ground_truth: str, extra_info: Mapping[str, object]) -> None:
    """Refuse a row without a right answer, where texts are compared.

    Raises:
        ValueError: the right answer is empty.
    """
    if not ground_truth.strip():
        raise _unusable(ground_truth)


def _closes_its_braces(text: str) -> bool:
    plain = _ESCAPED.sub("", text)
    depth = 0
    for character in plain:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


def _unusable(ground_truth: str) -> ValueError:
    shown = ground_truth if len(ground_truth) <= 200 else ground_truth[:200] + "..."
    return ValueError(
        f"ground_truth = {shown!r}: a mathematical answer is needed, such as '12', "
        r"'\frac{1}{2}' or 'x+1'"
    )
