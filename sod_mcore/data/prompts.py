"""Prompts of reinforcement-learning data sets, and the order in which a run draws them.

The schema is that of the public SOD data: ``data_source``, ``prompt`` (messages), ``ability``,
``reward_model`` (``ground_truth``, ``style``) and ``extra_info``. Each row is judged by itself;
nothing about a file is concluded from its first row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sod_mcore.data.order import EpochOrder
from sod_mcore.data.parquet import FieldError, mapping_field, messages_field, read_rows, text_field
from sod_mcore.trajectory import Prompt


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a Parquet file; ``prompt_id`` is file name and row number.

    ``reward_model`` and ``extra_info`` may be JSON text. A structured ground truth (unit tests)
    becomes JSON text.

    Raises:
        DataError: the file cannot be read, or rows are malformed (file, row and field are named).
    """

    def parse(number: int, row: dict[str, Any]) -> Prompt:
        return Prompt(
            messages=tuple(messages_field(row, "prompt")),
            ground_truth=_ground_truth(mapping_field(row, "reward_model")),
            data_source=text_field(row, "data_source"),
            prompt_id=f"{path.stem}/{number}",
            extra_info=mapping_field(row, "extra_info", default={}),
        )

    return read_rows(path, parse)


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
    """What the user asks: the content of the last user message.

    Raises:
        ValueError: there is no user message.
    """
    for message in reversed(prompt.messages):
        if message["role"] == "user":
            return str(message["content"])
    raise ValueError(f"prompt {prompt.prompt_id!r} has no user message")


def _ground_truth(reward_model: dict[str, Any]) -> str:
    value = reward_model.get("ground_truth")
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise FieldError("reward_model.ground_truth", f"is {value!r}; write the answer as text")
    return value
