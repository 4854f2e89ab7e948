r"""Grader of answers by the normalised text after "Answer:", as in Minerva and DAPO.

The rules are those of Minerva (Lewkowycz et al., arXiv 2206.14858, appendix D.1), in the form that
the reference took from veRL's DAPO scorer. Their quirks are part of them: an "a" at the end of any
word vanishes, and the answer must begin within the last 300 characters.
"""

import re
from collections.abc import Mapping

from sod_mcore.rewards.interface import Verdict

_LAST_CHARACTERS = 300
_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
_WORDS = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots",
    "sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds",
    "meters", "meals", "edges", "students", "childrentickets", "multiples",
)  # fmt: skip
_MARKUP = (
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}"),
    *(r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)
_REWRITTEN = (
    (re.compile(r".*?\$(.*?)\$.*"), r"$\1$"),
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


def minerva(response_text: str, ground_truth: str, _: Mapping[str, object]) -> Verdict:
    """Right if the last "Answer: ..." and the right answer are one text when normalised."""
    matches = _ANSWER.findall(response_text[-_LAST_CHARACTERS:])
    if not matches:
        return Verdict("no_answer")
    prediction = normalised_answer(matches[-1])
    is_right = prediction == normalised_answer(ground_truth)
    return Verdict("right" if is_right else "wrong", prediction)


def normalised_answer(answer: str) -> str:
    """The answer without units, markup and spaces, by Minerva's rules."""
    answer = answer.split("=")[-1]
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for removed in (*_WORDS, *_MARKUP):
        answer = answer.replace(removed, "")
    for pattern, replacement in _REWRITTEN:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    without_commas = answer.replace(",", "")
    return without_commas if without_commas.isdigit() else answer.strip()
