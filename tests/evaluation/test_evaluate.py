"""What an evaluation during training reports."""

from __future__ import annotations

import dataclasses

import pytest

from sod_mcore.evaluation.evaluate import summarise
from sod_mcore.trajectory import Trajectory
from tests.evaluation.fakes import answered, data_set


def trajectories(*answers: tuple[str, str]) -> list[Trajectory]:
    """Two samples of each of two problems, whose answers are 0 and 1."""
    prompts = data_set("aime", 2).prompts
    return [
        answered(prompt, answer=answer)
        for prompt, given in zip(prompts, answers, strict=True)
        for answer in given
    ]


def test_several_samples_tell_an_error_and_pass_at_n() -> None:
    metrics = summarise(trajectories(("0", "0"), ("1", "5")), 1.0, num_dropped=0).metrics()
    assert metrics["evaluation/temperature_1/accuracy"] == 0.75
    assert metrics["evaluation/temperature_1/pass_at_2"] == 1.0
    assert metrics["evaluation/temperature_1/standard_error"] == pytest.approx(0.25)


def test_one_sample_tells_neither() -> None:
    once = trajectories(("0", "0"), ("1", "5"))[::2]
    metrics = summarise(once, 0.0, num_dropped=0).metrics()
    assert not [name for name in metrics if "pass_at" in name or "error" in name]


def test_a_problem_that_lost_a_sample_is_not_in_pass_at_n() -> None:
    left = trajectories(("0", "0"), ("5", "1"))[:3]
    assert summarise(left, 1.0, num_dropped=1).repeated["pass_at_2"] == 1.0


def test_accuracy_is_told_by_source() -> None:
    mixed = [
        dataclasses.replace(trajectory, data_source=source)
        for trajectory, source in zip(trajectories(("0", "0"), ("1", "5")), "aabb", strict=True)
    ]
    assert summarise(mixed, 1.0, num_dropped=0).accuracy_by_source == {"a": 1.0, "b": 0.5}
