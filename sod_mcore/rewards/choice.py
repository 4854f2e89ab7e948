r"""Grader of multiple-choice answers: the letter of an option in the last box."""

import re
from collections.abc import Mapping

from sod_mcore.rewards.boxed import read_boxed_answer
from sod_mcore.rewards.interface import Verdict

_WRAPPED = "\x00"
"""Stands for the beginning of a `\\text{...}`, which sets a letter off from what follows it."""

_MARKUP = (
    (
        re.compile(
            r"\\(?:text\w*|math(?:rm|bf|it|sf|tt|cal|bb|frak)|boldsymbol|bm|pmb|mbox|underline"
            r"|emph|operatorname)\s*\{"
        ),
        _WRAPPED,
    ),
    (re.compile(r"\\[,;:! ]|\\q?quad(?![A-Za-z])|\\\\|~"), " "),
    (re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[()\[\]]|[{}$`*'\"‘’“”]"), ""),
)
_LABEL = re.compile(
    r"(?:(?:the\s+)?(?:(?:correct|right|final|best)\s+)?(?:option|choice|answer)(?:\s+is)?"
    r"(?:\s*:\s*|[\s\x00]+))+",
    re.IGNORECASE,
)
_OPTION = re.compile(
    r"""[(\[][\s\x00]*(?P<enclosed>[A-J])\s*[)\]](?P<behind_enclosed>\W.*)?  # (B), or (B) and words
    |(?P<plain>[A-J])(?P<behind_plain>
        (?:\s*[.:,)]|\s+[-–—]|[-–—]\s|\s*\x00).*                       # "B." or "B -" and words
        |\s+is\s+(?:the\s+)?(?:correct|right|best)(?:\s+\w+)?\.?       # B is correct
        |\s*)
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_ANOTHER = re.compile(  # without I, which is more often a Roman number
    r"""(?<![A-Za-z\d])[(\[]\s*(?P<enclosed>[A-HJ])\s*[)\]]            # (C)
    |\A[\s.,:;)/&-]*(?:(?i:and|or)\s+)?(?P<listed>[A-HJ])(?=\s*(?:[.,:;)/&]|\Z|(?i:and|or)\b))
    """,
    re.VERBOSE,
)


def choice(response_text: str, ground_truth: str, extra_info: Mapping[str, object]) -> Verdict:
    r"""Right if the last box names the right option, and no other: B, (B), b, `\text{B}`, Option B,
    "B. its text".

    Args:
        response_text: text of the final turn.
        ground_truth: the right option's letter, A to J.
        extra_info: not used.

    Raises:
        ValueError: the ground truth is no such letter.
    """
    truth = _read_truth(ground_truth)
    box = read_boxed_answer(response_text)
    if box.problem:
        return Verdict(box.problem, box.text)
    letter = _read_letter(box.text)
    if letter is None:
        return Verdict("bad_format", box.text)
    return Verdict("right" if letter == truth else "wrong", letter)


def check_truth(ground_truth: str, extra_info: Mapping[str, object]) -> None:
    """Refuse a row without a letter.

    Raises:
        ValueError: the ground truth is no letter from A to J.
    """
    _read_truth(ground_truth)


def _read_truth(ground_truth: str) -> str:
    truth = ground_truth.strip().upper()
    if not re.fullmatch("[A-J]", truth):
        raise ValueError(
            f"ground_truth = {ground_truth!r}: a multiple-choice answer must be one letter, A to J"
        )
    return truth


def _read_letter(answer: str) -> str | None:
    """The letter of the one option that an answer names, or None."""
    for pattern, replacement in _MARKUP:
        answer = pattern.sub(replacement, answer)
    blank = " \t\n" + _WRAPPED
    unmarked = answer.strip(blank)
    label = _LABEL.match(unmarked)
    match = _OPTION.fullmatch(unmarked[label.end() if label else 0 :].lstrip(blank))
    if match is None:
        return None
    letter: str = match["enclosed"] or match["plain"]
    behind = (match["behind_enclosed"] or match["behind_plain"] or "").replace(_WRAPPED, " ")
    # "(b) f(A)" and "B. f (a)" name one option: letters of the other case are text.
    others = _ANOTHER.finditer(behind if letter.isupper() else behind.swapcase())
    if any((other["enclosed"] or other["listed"]) != letter.upper() for other in others):
        return None
    return letter.upper()
