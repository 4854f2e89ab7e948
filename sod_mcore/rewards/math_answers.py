r"""Graders of mathematical answers: by value (math-verify), or by the reference's exact text.

An answer by value is compared in stages, because math-verify alone is wrong about tiny numbers,
units and words: as text, as plain numbers, as words, and only then as mathematics.
"""

import re
from collections.abc import Mapping
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Basic

from sod_mcore.rewards.answer_text import (
    is_words,
    may_be_same_mathematics,
    normalised_words,
    unwrap,
    with_commands,
    without_spacing,
)
from sod_mcore.rewards.boxed import LONGEST_ANSWER, nesting_depth, read_boxed_answer
from sod_mcore.rewards.interface import Verdict
from sod_mcore.rewards.math_truth import DEEPEST_NESTING, read_truth
from sod_mcore.rewards.plain_numbers import is_same_quantity, read_quantity

_E_NOTATION = re.compile(r"(?<=\d)[eE]([+-]?\d{1,3})(?!\d)")
_STRICT_WINDOW = 100


def math_verify_grader(
    response_text: str, ground_truth: str, extra_info: Mapping[str, object]
) -> Verdict:
    r"""Right if the last `\boxed{...}` has the value of the right answer.

    Args:
        response_text: text of the final turn.
        ground_truth: LaTeX or plain text, with or without dollar signs or a box of its own: "12",
            "\frac{1}{2}", "x+1", "0.25 M", "hydrogen bonding".
        extra_info: not used.

    Raises:
        ValueError: the ground truth is empty.
    """
    truth = read_truth(ground_truth)
    box = read_boxed_answer(response_text)
    if box.problem:
        return Verdict(box.problem, box.text)
    answer = unwrap(box.text)
    is_right = _is_same_answer(answer, truth)
    if is_right is None:
        return Verdict("bad_format", answer)
    return Verdict("right" if is_right else "wrong", answer)


def strict_box(response_text: str, ground_truth: str, extra_info: Mapping[str, object]) -> Verdict:
    r"""Right if the last box has exactly the text of the right answer: the reference's rule.

    Its quirks are kept (the public implementation of arXiv 2605.07725, commit 110c4b8): only the
    last 100 characters are read; no space, quote or spelling is forgiven; braces are counted
    whether escaped or not.
    """
    end = response_text[-_STRICT_WINDOW:]
    opening = end.rfind(r"\boxed{")
    if opening < 0:
        return Verdict("no_answer")
    content = _matched_braces(end[opening + len(r"\boxed{") :])
    if content is None:
        return Verdict("bad_format")
    return Verdict("right" if content == ground_truth else "wrong", content)


def _matched_braces(text: str) -> str | None:
    depth = 1
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:position]
    return None


def _is_same_answer(answer: str, truth: str) -> bool | None:
    """Whether the answers are the same; None if the first cannot be read."""
    answer, truth = with_commands(answer), with_commands(truth)
    if without_spacing(answer) == without_spacing(truth):
        return True
    answered, right = read_quantity(answer), read_quantity(truth)
    if answered and right:
        return is_same_quantity(answered, right)
    is_too_long = len(truth) > LONGEST_ANSWER
    if right is None and (is_words(truth) or is_too_long):
        if normalised_words(answer) == normalised_words(truth):
            return True
        if is_too_long or not may_be_same_mathematics(answer, truth):
            return False
    return _has_same_value(answer, truth)


def _has_same_value(answer: str, truth: str) -> bool | None:
    parsed_answer, parsed_truth = _parse(answer), _parse(truth)
    if not parsed_answer:
        return None
    # Limits of math-verify's own work by signals, on the main thread only; the pool has one.
    if not verify(parsed_truth, parsed_answer, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    return not any(_differ_in_size(a, t) for a in parsed_answer for t in parsed_truth)


def _parse(answer: str) -> list[Any]:
    """sympy's expression of an answer in a list; an empty list if it is none."""
    if nesting_depth(answer) > DEEPEST_NESTING:
        return []
    latex = _E_NOTATION.sub(r"\\times 10^{\1}", answer).replace("**", "^")
    expressions: list[Any] = parse(
        rf"\boxed{{{latex}}}",
        [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return expressions


def _differ_in_size(answer: Any, truth: Any) -> bool:
    """Whether two numbers differ that math-verify takes for equal since both are nearly zero."""
    if not (isinstance(answer, Basic) and isinstance(truth, Basic)):
        return False
    try:
        if not (answer.is_number and truth.is_number):
            return False
        size = abs(truth.evalf(30))
        return size < 1e-3 and bool(abs((answer - truth).evalf(30)) > 1e-6 * size)
    except Exception:
        # sympy raises whatever it raises on sets, relations and the like, which are no numbers.
        return False
