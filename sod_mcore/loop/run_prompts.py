"""The prompts of a run: read once, judged before anything expensive starts, and handed on."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sod_mcore.chat import ChatRenderer
from sod_mcore.config import ConfigError, SodConfig
from sod_mcore.data.lengths import LongPrompt, split_by_length
from sod_mcore.data.overlap import assert_disjoint
from sod_mcore.data.prompts import read_prompts, read_questions
from sod_mcore.loop.teacher_checks import check_teacher_prompts
from sod_mcore.rollout.judge import check_verifiers
from sod_mcore.tools import tool_schemas
from sod_mcore.trajectory import Prompt


@dataclass(frozen=True)
class RunPrompts:
    """What a run trains on and evaluates on; empty where it replays recorded batches."""

    train: tuple[Prompt, ...] = ()
    evaluation: tuple[Prompt, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Every ``data_source``, sorted."""
        return tuple(sorted({prompt.data_source for prompt in (*self.train, *self.evaluation)}))


def read_run_prompts(config: SodConfig) -> RunPrompts:
    """Read the prompts of a run that does not replay, of whatever length.

    Raises:
        ConfigError: a prompt has no verifier or no teacher, or there are too few.
        DataError: a file cannot be read, or rows of it are malformed.
        OverlapError: a question of the evaluation is also trained on.
    """
    train = _read(config, config.data.train)
    evaluation = read_evaluation_prompts(config)
    prompts = RunPrompts(tuple(train), tuple(evaluation))
    _check_number(config, train)
    check_verifiers(config.reward, [*train, *evaluation])
    check_teacher_prompts(config, train)
    if evaluation:
        held_out = [q for file in config.evaluation.data_files for q in read_questions(file)]
        assert_disjoint({config.data.train: read_questions(config.data.train)}, held_out)
    return prompts


def read_evaluation_prompts(config: SodConfig) -> list[Prompt]:
    """All prompts of ``evaluation.data``.

    Raises:
        DataError: a file cannot be read, or rows of it are malformed.
    """
    return [prompt for file in config.evaluation.data_files for prompt in _read(config, file)]


def first_of_each_file(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """At most ``count`` prompts of each data file, in order; all of them for None."""
    taken: Counter[str] = Counter()
    kept = []
    for prompt in prompts:
        file = prompt.prompt_id.rpartition("/")[0]
        taken[file] += 1
        if count is None or taken[file] <= count:
            kept.append(prompt)
    return kept


def prompt_renderer(config: SodConfig) -> ChatRenderer:
    """What turns a prompt into the student's tokens."""
    return ChatRenderer.from_folder(
        config.student.model_path, enable_thinking=config.chat.enable_thinking
    )


def _read(config: SodConfig, file: str) -> list[Prompt]:
    return read_prompts(file, instructions=config.data.instructions)


def within_length(config: SodConfig, prompts: RunPrompts) -> RunPrompts:
    """The prompts whose tokens, tool schemas included, are at most ``data.max_prompt_tokens``.

    Raises:
        ConfigError: one is longer and must not be left out, or too few are left.
        DataError: the chat template refuses the messages of a prompt.
    """
    limit = config.data.max_prompt_tokens
    schemas: list[dict[str, Any]] = tool_schemas(config.tools)
    renderer = prompt_renderer(config)
    train, long_train = split_by_length(prompts.train, renderer, schemas, limit)
    _, long_evaluation = split_by_length(prompts.evaluation, renderer, schemas, limit)
    if long_evaluation:
        # Leaving some out would make another measure of it.
        raise ConfigError(_too_long(limit, long_evaluation[0], "raise it"))
    if long_train and config.data.overlong_prompts == "refuse":
        mend = "raise it, remove that prompt, or set data.overlong_prompts=drop"
        raise ConfigError(_too_long(limit, long_train[0], mend))
    if long_train:
        _say(f"{config.data.train}: left out {len(long_train)} of {len(prompts.train)} prompts of "
             f"more than data.max_prompt_tokens={limit} tokens")  # fmt: skip
    _check_number(config, train)
    return RunPrompts(tuple(train), prompts.evaluation)


def _check_number(config: SodConfig, train: Sequence[Prompt]) -> None:
    needed = config.algorithm.prompts_per_step + config.rollout.spare_prompts
    if len(train) < needed:
        name = "algorithm.prompts_per_step"
        if config.rollout.spare_prompts:
            name += " + rollout.spare_prompts"
        raise ConfigError(
            f"{name} is {needed}; data.train={config.data.train} has only "
            f"{len(train)} prompts: lower it, together with algorithm.prompts_per_mini_batch, or "
            "add prompts"
        )


def _too_long(limit: int, prompt: LongPrompt, mend: str) -> str:
    return (
        f"data.max_prompt_tokens is {limit}; {prompt.prompt.prompt_id} has {prompt.num_tokens} "
        f"tokens with the tool schemas: {mend}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
