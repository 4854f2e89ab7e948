r"""Extraction of the final answer from `\boxed{...}`, with nested braces."""

import re
from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from sod_mcore.rewards.thinking import without_thinking

_OPENING = re.compile(r"\\boxed\s*\{")
_BRACE_OR_ESCAPED = re.compile(r"\\.|[{}]", re.DOTALL)

LONGEST_ANSWER = 1000
"""Characters. A longer box holds no answer to any question here, and could keep a grader busy."""


@dataclass(frozen=True)
class BoxedAnswer:
    r"""What a response has in its last `\boxed{...}`.

    Attributes:
        text: the content, without whitespace at its ends; empty where there is none.
        problem: why the text is no answer: "no_answer" (no box, or an empty one), "bad_format" (its
            brace stays open, or it is longer than `LONGEST_ANSWER`); None if it is one.
    """

    text: str
    problem: Literal["no_answer", "bad_format"] | None = None


def read_boxed_answer(response_text: str) -> BoxedAnswer:
    r"""The last box of a response behind its thinking, and what is the matter with it."""
    text = without_thinking(response_text)
    content = extract_last_boxed(text)
    if content is None:
        return BoxedAnswer("", "bad_format" if _OPENING.search(text) else "no_answer")
    answer = content.strip()
    if len(answer) > LONGEST_ANSWER:
        return BoxedAnswer(answer[:LONGEST_ANSWER], "bad_format")
    return BoxedAnswer(answer, None if answer else "no_answer")


def extract_last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, or None if there is none or its brace stays open.

    A backslash takes the next character out of the count, so that `\{` and `\}` are content.
    """
    last = deque(_OPENING.finditer(text), maxlen=1)
    if not last:
        return None
    start = last[0].end()
    depth = 1
    for match in _BRACE_OR_ESCAPED.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start : match.start()]
    return None


def nesting_depth(text: str) -> int:
    """How deep braces, brackets and parentheses stand within each other."""
    steps = (("{[(".count(character) - "}])".count(character)) for character in text)
    return max(accumulate(steps), default=0)
