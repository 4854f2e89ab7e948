"""Every recipe is a whole, valid configuration, and differs from SOD in what its row says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.config import EvalConfig, SftConfig, SodConfig, TopKConfig
from sod_mcore.config_file import load_config
from sod_mcore.evaluation.preflight import check_context_length
from sod_mcore.loop.preflight import check_settings
from sod_mcore.serving.endpoints import RESERVED_TOKENS
from tests.end_to_end.programs import REPOSITORY

QWEN3 = REPOSITORY / "examples" / "qwen3"
ROWS = ("grpo", "opd", "opsd_gt", "opsd_hint", "sod")
ABLATIONS = ("opd_alone", "sod_alone", "failure_decay", "failure_mask", "no_clip", "reward_gate")
RECIPES = [
    *(QWEN3 / size / f"{row}.yaml" for size in ("0.6b", "1.7b") for row in ROWS),
    *(QWEN3 / "1.7b" / f"{row}.yaml" for row in ABLATIONS),
    QWEN3 / "4b" / "teacher_grpo.yaml",
]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def load(path: Path) -> SodConfig:
    return load_config(SodConfig, path)


def test_there_is_no_other_recipe() -> None:
    others = {"sft", "vanilla"}
    found = {path for path in QWEN3.glob("*/*.yaml") if path.stem not in others}
    assert found == set(RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_can_be_run(path: Path) -> None:
    config = load(path)
    check_settings(config)
    assert config.run.directory == f"runs/qwen3/{path.parent.name}/{path.stem}"
    assert config.serving is not None
    taken = [gpu for engine in config.serving.models.values() for gpu in engine.gpus]
    ranks = range(4)
    is_full = "teacher" in config.serving.models or path.stem == "teacher_grpo"
    assert sorted([*taken, *ranks]) == list(range(8 if is_full else 6))
    assert config.rollout.concurrency <= config.serving.max_connections
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    for engine in config.serving.models.values():
        assert engine.context_length is not None
        assert engine.context_length - RESERVED_TOKENS >= longest


EXPECTED: dict[str, dict[str, Any]] = {
    "sod": {},
    "grpo": {"distillation": "none"},
    "opd": {"weighting": "uniform"},
    "opd_alone": {"weighting": "uniform", "grpo_coefficient": 0.0},
    "sod_alone": {"grpo_coefficient": 0.0},
    "failure_decay": {"weighting": "failure_decay"},
    "failure_mask": {"weighting": "failure_mask"},
    "no_clip": {"weight_delta": math.inf},
    "reward_gate": {"weighting": "reward_gate"},
}


@pytest.mark.parametrize(("row", "difference"), EXPECTED.items())
def test_a_row_differs_from_sod_in_what_it_says(row: str, difference: dict[str, Any]) -> None:
    sod, other = load(QWEN3 / "1.7b" / "sod.yaml"), load(QWEN3 / "1.7b" / f"{row}.yaml")
    assert other.algorithm == dataclasses.replace(sod.algorithm, **difference)
    same = dataclasses.replace(other, algorithm=sod.algorithm, run=sod.run, serving=sod.serving)
    assert same == sod


def test_the_published_constants() -> None:
    """Section 1 of the paper's inventory."""
    config = load(QWEN3 / "1.7b" / "sod.yaml")
    algorithm = config.algorithm
    assert (algorithm.prompts_per_step, algorithm.group_size) == (64, 16)
    assert algorithm.prompts_per_step // algorithm.prompts_per_mini_batch == 4
    assert (algorithm.weight_epsilon, algorithm.weight_delta) == (1e-6, 0.2)
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip) == (0.2, 0.28, 3.0)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-6, 0.01)
    assert (config.rollout.max_turns, config.rollout.max_response_tokens) == (16, 20480)
    assert (config.run.steps, load(QWEN3 / "0.6b" / "sod.yaml").run.steps) == (150, 120)


@pytest.mark.parametrize(
    ("row", "privileged"), [("opsd_gt", "ground_truth"), ("opsd_hint", "hint")]
)
def test_self_distillation(row: str, privileged: str) -> None:
    config = load(QWEN3 / "0.6b" / f"{row}.yaml")
    assert config.teacher.privileged == privileged
    algorithm = config.algorithm
    assert (algorithm.grpo_coefficient, algorithm.weighting) == (0.0, "uniform")
    assert algorithm.distillation == "topk_loss"
    assert algorithm.topk == TopKConfig(k=64, divergence="jsd", jsd_beta=0.5)
    assert config.serving is not None
    assert config.serving.teacher is not None
    assert config.serving.teacher.model_path == config.student.model_path


@pytest.mark.parametrize("size", ["0.6b", "1.7b"])
def test_the_rows_without_rollouts_in_training(size: str) -> None:
    sft = load_config(SftConfig, QWEN3 / size / "sft.yaml")
    assert (sft.sft.updates, sft.sft.batch_size) == (115, 128)
    vanilla = load_config(EvalConfig, QWEN3 / size / "vanilla.yaml")
    assert (vanilla.evaluation.samples, vanilla.evaluation.top_p) == (32, 0.6)
    assert vanilla.serving.student.context_length is not None
    check_context_length(vanilla, vanilla.serving.student.context_length)
