r"""Grader of multiple-choice answers: the letter of an option in the last box."""

import re
from collections.abc import Mapping

from sod_mcore.rewards.answer_text import unwrap
from sod_mcore.rewards.boxed import read_boxed_answer
from sod_mcore.rewards.interface import Verdict

_OPTION = re.compile(
    r"""(?:\\(?:text|textbf|textit|textrm|mathrm|mathbf)\s*\{\s*)?  # an opened \text{
    (?:\((?P<enclosed>[A-J])\)(?:\W.*)?                           # (B), or (B) and words
    |(?P<plain>[A-J])\s*(?:[}.:)].*)?)                            # B, or "B." and words
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)


def choice(response_text: str, ground_truth: str, extra_info: Mapping[str, object]) -> Verdict:
    r"""Right if the last box names the right option: B, (B), b, `\text{B}` or "B. its text".

    Args:
        response_text: text of the final turn.
        ground_truth: the right option's letter, A to J.
        extra_info: not used.

    Raises:
        ValueError: the ground truth is no such letter.
    """
    truth = ground_truth.strip().upper()
    if not re.fullmatch("[A-J]", truth):
        raise ValueError(
            f"ground_truth = {ground_truth!r}: a multiple-choice answer must be one letter, A to J"
        )
    box = read_boxed_answer(response_text)
    if box.problem:
        return Verdict(box.problem, box.text)
    answer = unwrap(box.text)
    match = _OPTION.fullmatch(answer)
    if match is None:
        return Verdict("bad_format", box.text)
    letter = (match["enclosed"] or match["plain"]).upper()
    return Verdict("right" if letter == truth else "wrong", letter)
