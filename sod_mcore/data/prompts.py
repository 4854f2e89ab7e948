"""Prompts of reinforcement-learning and evaluation sets, and the order in which a run draws them.

Each row is judged by itself: its schema is told by its own columns (``published.py``), its
instructions by its own data_source (``instructions.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sod_mcore.data.instructions import Question, with_instructions
from sod_mcore.data.order import EpochOrder
from sod_mcore.data.published import Problem, schema_of
from sod_mcore.data.row_files import source_name
from sod_mcore.data.rows import JudgedRow, judge_rows, read_rows
from sod_mcore.trajectory import Message, Prompt

Instructions = Literal["published", "none"]


def read_prompts(
    path: Path | str, *, instructions: Instructions = "published", show_tests: bool = False
) -> list[Prompt]:
    """The prompts of a file or data set; ``prompt_id`` is its name and the row number.

    Args:
        path: see :func:`sod_mcore.data.row_files.iterate_rows`.
        instructions: "published" adds to the questions of published data sets what their authors
            ask of the answer; "none" leaves every question as it is.
        show_tests: print the cases of LiveCodeBench_v6 in the prompt, as the reference does. They
            are those that the program is scored by, so scores are then too high.

    Raises:
        DataError: the file cannot be read, or rows are malformed (file, row and field are named).
    """
    return read_rows(path, _PromptParser(source_name(path), instructions, show_tests))


def judge_prompts(
    path: Path | str, *, instructions: Instructions = "published", limit: int | None = None
) -> Iterator[JudgedRow[Prompt]]:
    """As :func:`read_prompts`, row by row, and what is wrong with a row beside it.

    Raises:
        DataError: the file cannot be read at all.
    """
    return judge_rows(path, _PromptParser(source_name(path), instructions), limit)


def read_questions(path: Path | str) -> list[str]:
    """What each row asks, without instructions: texts by which overlaps of data sets are found.

    Raises:
        DataError: as :func:`read_prompts`.
    """
    return [question_text(prompt) for prompt in read_prompts(path, instructions="none")]


@dataclass(frozen=True)
class PromptSource:
    """Draws prompts by seed and step: resuming a run at a step needs only the step."""

    prompts: Sequence[Prompt]
    seed: int

    def batch(self, step: int, size: int) -> list[Prompt]:
        """``size`` distinct prompts for ``step`` (0, 1, ...), reshuffled every epoch.

        Raises:
            ValueError: there are fewer than ``size`` prompts.
        """
        order = EpochOrder(len(self.prompts), self.seed)
        return [self.prompts[index] for index in order.batch(step, size)]


def question_text(prompt: Prompt) -> str:
    """What the user asks: the content of the last user message, instructions included.

    Raises:
        ValueError: there is no user message.
    """
    for message in reversed(prompt.messages):
        if message["role"] == "user":
            return str(message["content"])
    raise ValueError(f"prompt {prompt.prompt_id!r} has no user message")


@dataclass(frozen=True)
class _PromptParser:
    name: str
    instructions: Instructions
    show_tests: bool = False

    def __call__(self, number: int, row: dict[str, Any]) -> Prompt:
        problem = schema_of(row).read(row)
        text = problem.question.text
        if self.instructions == "published":
            text = with_instructions(problem.data_source, self._shown(problem.question))
        return Prompt(
            messages=_with_last_question(problem, text),
            ground_truth=problem.ground_truth,
            data_source=problem.data_source,
            prompt_id=f"{self.name}/{number}",
            extra_info=problem.extra_info,
        )

    def _shown(self, question: Question) -> Question:
        return question if self.show_tests else replace(question, examples=())


def _with_last_question(problem: Problem, text: str) -> tuple[Message, ...]:
    if not problem.messages:
        return ({"role": "user", "content": text},)
    messages = list(problem.messages)
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[last] = {**messages[last], "content": text}
    return tuple(messages)
