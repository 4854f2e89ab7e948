"""Engines that sleep while the trainer works give the run that they give when they stay awake. On a
CPU they release no memory; the order of the calls and the numbers are those of any device."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sod_mcore.trajectory import RecordedBatch, recorded_batch_path
from tests.end_to_end.conftest import colocated_configuration
from tests.end_to_end.programs import TEACHER, metrics, run, torchrun, write_config
from tests.end_to_end.test_teachers import ANSWER_KNOWN, response_logprobs, told_prompt

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

STEPS = 2
ONE_TOKEN = 1e-6
"""A nucleus of the likeliest token alone: the rollouts are the same whenever they are played."""
PLACEMENTS = ("colocated", "split")
"""In this order on the same engines, which the first run has to leave awake."""
TEACHERS = ("served", "average")
"""Whose weights it has. An average is sent to its engines when they wake; and in that run, a Ray of
its own plays the conversations."""


@dataclass(frozen=True)
class Runs:
    """Two runs on one fleet.

    Attributes:
        folder: of both.
        teacher: ``teacher.weights`` of both.
    """

    folder: Path
    teacher: str

    def lines(self, placement: str) -> list[dict[str, Any]]:
        return metrics(self.folder / placement)

    def batch(self, placement: str, step: int) -> RecordedBatch:
        folder = self.folder / placement / "recordings"
        return RecordedBatch.load(recorded_batch_path(folder, step))


@pytest.fixture(scope="module", params=TEACHERS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("colocated")
    tree = colocated_configuration(folder)
    tree["rollout"] |= {"top_p": ONE_TOKEN}
    if request.param == "average":
        tree["teacher"] = {"weights": "average", "average_decay": 0.5, **ANSWER_KNOWN}
        tree["serving"]["teacher"]["model_path"] = tree["student"]["model_path"]
        on_ray = {"pool": "ray", "ray_address": None, "ray_actors": 1, "ray_actor_cpus": 1}
        tree["rollout"] |= on_ray
    tree["report"]["trace_every"] = 1
    commands = []
    for placement in PLACEMENTS:
        tree["run"] = {"directory": str(folder / placement), "steps": STEPS, "save_every": 0}
        tree["serving"]["placement"] = placement
        config = write_config(folder / f"{placement}.yaml", tree)
        record = ("--record", str(folder / placement / "recordings"))
        commands.append(shlex.join(torchrun(2, "pretrain_sod.py", str(config), *record)))
    # No engine may have been started again, and none may be asleep between the runs.
    restarts = f"! grep -q '\"restarts\": [1-9]' {folder}/serving/state.json"
    check = f"test ! -e {folder}/serving/asleep.json && {restarts}"
    script = f"{commands[0]} && {check} && {commands[1]} && {check}"
    serve = [sys.executable, "-m", "sod_mcore.serving", str(folder / "colocated.yaml")]
    run([*serve, "--", "sh", "-c", script], timeout_seconds=600)
    return Runs(folder, request.param)


@pytest.mark.parametrize("step", range(STEPS))
def test_the_rollouts_are_the_same(runs: Runs, step: int) -> None:
    asleep, awake = (runs.batch(placement, step) for placement in PLACEMENTS)
    assert len(asleep.trajectories) == len(awake.trajectories) == 16
    for ours, theirs in zip(asleep.trajectories, awake.trajectories, strict=True):
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        np.testing.assert_allclose(ours.teacher_logprobs, theirs.teacher_logprobs, atol=1e-4)
        assert (ours.weight_version[ours.loss_mask] == step).all()


def test_the_numbers_are_the_same(runs: Runs) -> None:
    """Evaluation too, before the first sleep and after the last one."""
    compared = ("distillation/", "evaluation/", "reward/", "rollout/", "update/")
    for ours, theirs in zip(runs.lines("colocated"), runs.lines("split"), strict=True):
        names = [name for name in theirs if name.startswith(compared)]
        assert len(names) > 3
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


def test_nothing_was_lost(runs: Runs) -> None:
    for line in runs.lines("colocated")[1:]:
        assert line["rollout/dropped"] == line["rollout/unscored"] == 0
        assert line["weights/probe_difference"] < 1e-4
        assert line["serving/restarts"] == 0
        for model in ("student", "teacher"):
            assert line[f"serving/{model}/retries"] == 0


@pytest.mark.parametrize("step", range(STEPS))
def test_the_teacher_scores_with_the_weights_of_its_step(runs: Runs, step: int) -> None:
    """An average begins as the student."""
    average = runs.folder / "colocated" / "weights" / f"average_{step:06d}"
    for trajectory in runs.batch("colocated", step).trajectories[:4]:
        prompt, folder = trajectory.token_ids[: trajectory.prompt_length], TEACHER
        if runs.teacher == "average":
            prompt = told_prompt(runs.folder / "data" / "train.parquet", trajectory)
            folder = average if step else runs.folder / "student"
        expected = response_logprobs(folder, prompt, trajectory)
        scored = trajectory.teacher_logprobs[trajectory.prompt_length :]
        np.testing.assert_allclose(scored, expected, atol=1e-4)


def test_the_timeline_tells_when_they_slept(runs: Runs) -> None:
    for line in runs.lines("colocated")[1:]:
        assert line["time/engine_sleep"] > 0
        assert line["time/engine_wake"] > 0
        works = line["time/old_logprobs"] + line["time/updates"]
        assert works < line["time/engines_asleep"] < line["time/step"]
    for line in runs.lines("split"):
        assert not [name for name in line if name.startswith("time/engine")]
