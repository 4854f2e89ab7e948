r"""Adds to a published problem what its data set asks of the answer, by the row's own data_source.

The pieces say in other words what the reference's say (sod: M1, M2, A, F, U, C), with one
difference: the box is written \boxed{...}, not \boxed{'...'}, since quotes that a model copies
make its answer wrong. The reference chooses by the first row of a file; here every row is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

_STEP_BY_STEP = "Work through the following {subject} step by step."
_TOOL_FOR_PRECISION = (
    "You may use the tool to calculate more precisely, and to check your result before you give "
    "the final answer."
)
_PLAN_FIRST = (
    "**Note: first analyse the problem and form a high-level strategy; only then use tools.**"
)
_BOX = (
    r"Once you are sure of the final answer, stop calling tools and give it as \boxed{...}, with "
    "the answer in place of the dots."
)
_NUMBER_ONLY = "Put no units into the box, only the number."
_LETTER_ONLY = "Put only the capital letter of the right option into the box."
_CHECK_PROGRAM = (
    "Before you submit, check your program with the tool. Once it is right, stop calling tools and "
    "submit it:\n```python\n# your program\n```"
)
_SPECIFICATION = (
    "You are given the specification of a programming problem. Write a correct Python program that "
    "meets it."
)
_STANDARD_STREAMS = "The program reads its input from stdin and writes its output to stdout."
_FUNCTION = "The tests call the function `{name}`; define it, and read no input."
_COMPLETE = "Complete the following Python function; submit all of it, with its imports."


@dataclass(frozen=True)
class Question:
    """What a row asks, and what the wording of its instructions depends on.

    Attributes:
        text: the question itself.
        domain: the science that it is from; empty if the row does not say.
        function_name: the function that tests call; empty for programs that read stdin.
        examples: pairs of input and output to print below the question.
    """

    text: str
    domain: str = ""
    function_name: str = ""
    examples: tuple[tuple[str, str], ...] = ()


def with_instructions(data_source: str, question: Question) -> str:
    """The text of the user's message; sources that are not published ones get the bare question."""
    for pattern, pieces in _RULES:
        if fnmatchcase(data_source, pattern):
            return "\n\n".join(pieces(question))
    return question.text


def _math(question: Question) -> list[str]:
    start = _STEP_BY_STEP.format(subject="math problem")
    return [start, question.text, _TOOL_FOR_PRECISION, _PLAN_FIRST, _BOX]


def _bare_math(question: Question) -> list[str]:
    return [*_math(question), _NUMBER_ONLY]


def _instructed_math(question: Question) -> list[str]:
    return [question.text, _NUMBER_ONLY]


def _program(question: Question) -> list[str]:
    return [question.text, _PLAN_FIRST, _CHECK_PROGRAM]


def _choice(question: Question) -> list[str]:
    start = _STEP_BY_STEP.format(subject=f"{question.domain} problem".lstrip())
    return [start, question.text, _TOOL_FOR_PRECISION, _PLAN_FIRST, _BOX, _LETTER_ONLY]


def _specified_program(question: Question) -> list[str]:
    name = question.function_name
    form = _FUNCTION.format(name=name) if name else _STANDARD_STREAMS
    examples = [_example(*pair) for pair in question.examples]
    return [_SPECIFICATION, question.text, *examples, _PLAN_FIRST, form, _CHECK_PROGRAM]


def _function(question: Question) -> list[str]:
    fenced = f"```python\n{question.text.strip()}\n```"
    return [_COMPLETE, fenced, _PLAN_FIRST, _CHECK_PROGRAM]


def _example(example_input: str, example_output: str) -> str:
    return f"Example input:\n{example_input}\nExample output:\n{example_output}"


# The prompts of math_dapo and mega-science are published with all but the last instruction.
_RULES: tuple[tuple[str, Callable[[Question], list[str]]], ...] = (
    ("math_dapo", _instructed_math),
    ("mega-science", _instructed_math),
    ("train-math-*", _bare_math),
    ("train-code-*", _program),
    ("AIME2024", _math),
    ("AIME2025", _math),
    ("gpqa_diamond", _choice),
    ("LiveCodeBench_v6", _specified_program),
    ("humaneval", _function),
    ("HumanEval", _function),
)
