"""Every wrong combination gets one line that names the field, the value and the mend."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from sod_mcore.config import SodConfig
from tests.end_to_end.programs import REPOSITORY
from tests.loop.preflight.wrong_settings import problem


def test_all_is_well_but_for_the_engines(tree: dict[str, Any]) -> None:
    assert "python -m sod_mcore.serving" in problem(tree)


def test_mini_batches_that_do_not_divide(tree: dict[str, Any]) -> None:
    found = problem(tree, algorithm__prompts_per_step=3, algorithm__prompts_per_mini_batch=2)
    assert "algorithm.prompts_per_mini_batch is 2" in found


def test_a_rule_of_step_weights_that_does_not_exist(tree: dict[str, Any]) -> None:
    found = problem(tree, algorithm__weighting="sodd")
    assert "algorithm.weighting is 'sodd'; it must be one of sod, uniform" in found


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"distillation": "topk_loss"}, "algorithm.distillation is topk_loss, but"),
        ({"distillation": "none", "topk": {"k": 4}}, "algorithm.topk.k is 4, but"),
    ],
)
def test_candidates_and_their_loss_go_together(
    tree: dict[str, Any], algorithm: dict[str, Any], expected: str
) -> None:
    assert expected in problem(tree, algorithm={**tree["algorithm"], **algorithm})


def test_an_implementation_that_does_not_exist(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOD_OPS", "bogus")
    assert "SOD_OPS=bogus must be one of auto, eager, fused" in problem(tree)


def test_a_nucleus_that_the_logprobs_do_not_know(tree: dict[str, Any]) -> None:
    tree["rollout"] = {"top_p": 0.9}
    assert "rollout.top_p is 0.9" in problem(tree, algorithm__old_logprobs="rollout")


def test_old_tokens_need_a_correction(tree: dict[str, Any]) -> None:
    tree["rollout"] = {"max_staleness": 1}
    assert "set algorithm.tis_cap (2.0 is usual)" in problem(tree)
    tree["algorithm"] |= {"old_logprobs": "rollout"}
    assert "max_staleness" not in problem(tree)
    tree["algorithm"] |= {"old_logprobs": "recompute", "tis_cap": 2.0}
    assert "max_staleness" not in problem(tree)


def test_a_teacher_that_would_change_while_it_scores_ahead(tree: dict[str, Any]) -> None:
    tree["rollout"] = {"max_staleness": 1}
    tree["algorithm"] |= {"tis_cap": 2.0}
    tree["teacher"] = {"weights": "average"}
    message = problem(tree)
    assert "teacher.weights is average" in message
    assert "set teacher.weights=served, or rollout.max_staleness=0" in message


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"old_logprobs": "rollout"}, "but algorithm.old_logprobs is rollout"),
        (
            {"grpo_coefficient": 0.0, "distillation": "topk_loss", "topk": {"k": 4}},
            "with grpo_coefficient=0 and distillation=topk_loss there are none",
        ),
    ],
)
def test_importance_weights_that_weigh_nothing(
    tree: dict[str, Any], algorithm: dict[str, Any], expected: str
) -> None:
    tree["algorithm"] |= {"tis_cap": 2.0, **algorithm}
    found = problem(tree)
    assert found.startswith("algorithm.tis_cap is 2, but ")
    assert expected in found


def test_a_temperature_that_the_teacher_cannot_score(tree: dict[str, Any]) -> None:
    assert "rollout.temperature is 0.7" in problem(tree, rollout={"temperature": 0.7})


def test_a_penalty_for_length_that_begins_before_the_response(tree: dict[str, Any]) -> None:
    tree["rollout"] = {"max_response_tokens": 100}
    assert "reward.overlong_buffer is 101" in problem(tree, reward={"overlong_buffer": 101})


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ({"weights": "live"}, "teacher.weights is live, but teacher.privileged is none"),
        (
            {"weights": "live", "privileged": "hint", "by_source": {"a": "teacher"}},
            "teacher.by_source is {'a': 'teacher'}, but teacher.weights is live",
        ),
        (
            {"by_source": {"math": "coder"}},
            "teacher.by_source.math is 'coder', which is no teacher",
        ),
        ({"by_source": {"math": "student"}}, "teacher.by_source.math is 'student'"),
        ({"weights": "average"}, "serving.teacher.model_path is"),
        (
            {"weights": "average", "by_source": {"a": "teacher"}},
            "teacher.weights is average: that is one teacher",
        ),
        (
            {"privileged_text": "x"},
            "teacher.privileged_text is 'x', but teacher.privileged is none",
        ),
        (
            {"privileged": "hint", "privileged_text": "{ground_truth}"},
            "teacher.privileged_text is '{ground_truth}'; it must hold {hint}",
        ),
        ({"privileged": "hint"}, "train/0: extra_info.hint is None"),
        ({"by_source": {"math_": "teacher"}}, "teacher.by_source.math_: no training prompt has"),
        (
            {"weights": "live", "privileged": "ground_truth"},
            "teacher.weights is live, but serving.teacher is configured, whose",
        ),
    ],
)
def test_teachers_that_cannot_teach(
    tree: dict[str, Any], teacher: dict[str, Any], expected: str
) -> None:
    assert expected in problem(tree, teacher=teacher)


@pytest.mark.parametrize("teacher", [{"weights": "average"}, {"privileged": "ground_truth"}])
def test_a_teacher_whom_nobody_asks(tree: dict[str, Any], teacher: dict[str, Any]) -> None:
    tree["algorithm"]["distillation"] = "none"
    assert "so no teacher is asked" in problem(tree, teacher=teacher)


def test_packages_that_are_not_there(tree: dict[str, Any]) -> None:
    found = problem(tree, tools={"packages": ["no/such/folder"]})
    assert "tools.packages has 'no/such/folder', which is no folder here" in found


def test_a_tool_that_does_not_exist(tree: dict[str, Any]) -> None:
    assert "tools.names has 'abacus'; it must be one of" in problem(
        tree, tools={"names": ["abacus"]}
    )


def test_a_missing_student(tree: dict[str, Any]) -> None:
    assert "student.model_path" in problem(tree, student__model_path="nowhere")


def test_heads_that_the_ranks_cannot_share(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = problem(tree, student__megatron={"tensor_model_parallel_size": 3})
    assert "tensor_model_parallel_size" in found


def test_a_recording_that_does_not_exist(tree: dict[str, Any]) -> None:
    assert "run.replay is nowhere" in problem(tree, run__replay="nowhere")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.stepz=3", "run.stepz is not a setting; allowed here: "),
        ("student.megatron.tensor_model_parallel_sise=2", "tensor_model_parallel_sise"),
    ],
)
def test_the_program_ends_with_one_line_and_exit_code_2(
    tree: dict[str, Any], tmp_path: Path, override: str, expected: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tree))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "pretrain_sod.py", str(config), override],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]


def test_the_base_configuration_is_immutable(tree: dict[str, Any]) -> None:
    config = TypeAdapter(SodConfig).validate_python(tree)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.steps = 3  # type: ignore[misc]
