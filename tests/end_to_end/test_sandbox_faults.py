"""Sandboxes that are killed while programs run: the run goes on, and its numbers stay right.

A program that dies with its sandbox has not failed: its conversation is played again. A program
that is killed itself has, for that is how the kernel ends one that takes all memory.
"""

from __future__ import annotations

import copy
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from sod_mcore.trajectory import RecordedBatch, Trajectory, recorded_batch_path
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.drills import Drill, drill, send, wait_for_rollout
from tests.end_to_end.programs import TEACHER, metrics, torchrun, write_config
from tests.end_to_end.test_live import input_logprobs

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

STEPS = 4
SANDBOXES, PROGRAMS = 1, 2
"""Steps, counted from 0, in which the one and the other are killed."""
TRAJECTORIES = 16 * 4
KILLED = "Execution was killed: it used too much CPU time or memory."


@dataclass(frozen=True)
class FaultyRun:
    """What the run left behind.

    Attributes:
        folder: of the run.
        weights: the student's while sandboxes were killed.
        killed: sandboxes, and programs, that were killed.
        output: all that was printed.
        exit_code: of the run.
    """

    folder: Path
    weights: Path
    killed: tuple[int, int]
    output: str
    exit_code: int

    def line(self, step: int) -> dict[str, Any]:
        """The metrics of a step, counted from 0."""
        return metrics(self.folder / "run")[step + 1]

    def batch(self, step: int) -> tuple[Trajectory, ...]:
        path = recorded_batch_path(self.folder / "recordings", step)
        return RecordedBatch.load(path).trajectories


@pytest.fixture(scope="module")
def faulty_run(live_run: LiveRun, tmp_path_factory: pytest.TempPathFactory) -> FaultyRun:
    folder = tmp_path_factory.mktemp("sandboxes")
    config = write_config(folder / "sod.yaml", configuration(live_run, folder / "run"))
    record = ["--record", str(folder / "recordings")]
    serve = [sys.executable, "-m", "sod_mcore.serving", str(config)]
    train = torchrun(2, "pretrain_sod.py", str(config), *record)
    with drill([*serve, "--", *train], folder / "run", folder) as it:
        wait_for_rollout(it, SANDBOXES)
        version = f"version_{SANDBOXES:06d}"
        shutil.copytree(folder / "run" / "weights" / version, folder / version)
        sandboxes = kill_all(it, sandboxes_of)
        wait_for_rollout(it, PROGRAMS)
        programs = kill_all(it, programs_of)
        code = it.process.wait(timeout=600)
        assert not it.members()
        return FaultyRun(folder, folder / version, (sandboxes, programs), it.output(), code)


def configuration(live_run: LiveRun, run: Path) -> dict[str, Any]:
    tree: dict[str, Any] = copy.deepcopy(live_run.tree)
    tree["run"] = {"directory": str(run), "steps": STEPS, "save_every": 0}
    tree["algorithm"] |= {"prompts_per_step": 16, "prompts_per_mini_batch": 8, "topk": {"k": 0}}
    tree["tools"] |= {"names": ["tests.end_to_end.slow_interpreter:make"], "workers": 4}
    tree["evaluation"] = {}
    tree["report"] = {"wandb": "disabled"}
    return tree


def kill_all(it: Drill, find: Callable[[Drill], list[psutil.Process]]) -> int:
    """Kill them, those that run a program and those that wait for one; how many there were."""
    it.wait_until(lambda: bool(find(it)), seconds=30.0)
    found = find(it)
    for process in found:
        send(process, signal.SIGKILL)
    return len(found)


def sandboxes_of(it: Drill) -> list[psutil.Process]:
    """The bubblewrap processes of the rollout pool."""
    children = psutil.Process(it.member("sod_mcore.rollout.worker").pid).children()
    return [child for child in children if child.name() == "bwrap"]


def programs_of(it: Drill) -> list[psutil.Process]:
    """The interpreters inside."""
    return [program for sandbox in sandboxes_of(it) for program in sandbox.children()]


def observations(trajectory: Trajectory) -> list[str]:
    return [str(m["content"]) for m in trajectory.messages if m["role"] == "tool"]


def test_the_run_goes_on_to_its_end(
    faulty_run: FaultyRun, record_property: Callable[[str, object], None]
) -> None:
    assert faulty_run.exit_code == 0, faulty_run.output[-6000:]
    for step in range(STEPS):
        line = faulty_run.line(step)
        assert line["rollout/trajectories"] == TRAJECTORIES
        assert line["rollout/dropped"] == line["rollout/unscored"] == 0
        record_property(f"seconds_of_step_{step}", round(line["time/step"], 1))


def test_conversations_whose_sandbox_was_killed_are_played_again(
    faulty_run: FaultyRun, record_property: Callable[[str, object], None]
) -> None:
    retries = [faulty_run.line(step)["rollout/retries"] for step in range(STEPS)]
    record_property("sandboxes_killed", faulty_run.killed[0])
    record_property("conversations_played_again", int(retries[SANDBOXES]))
    sandboxes, programs = faulty_run.killed
    assert 1 <= retries[SANDBOXES] <= sandboxes
    assert retries[0] == retries[STEPS - 1] == 0
    log = (faulty_run.folder / "run" / "rollout_pool.log").read_text()
    assert "InfrastructureError: bubblewrap was ended by SIGKILL while a program ran" in log
    # One that is killed before it has its program ran none, and is no failure of it either.
    assert retries[PROGRAMS] <= programs
    if retries[PROGRAMS]:
        assert "InfrastructureError: a sandboxed interpreter ended early" in log


def test_what_happened_to_a_sandbox_is_no_observation(faulty_run: FaultyRun) -> None:
    for step in (0, SANDBOXES, STEPS - 1):
        texts = [text for t in faulty_run.batch(step) for text in observations(t)]
        assert len(texts) > TRAJECTORIES / 2
        assert not [text for text in texts if "killed" in text or "bubblewrap" in text]


def test_a_program_that_was_killed_is_a_call_that_failed(
    faulty_run: FaultyRun, record_property: Callable[[str, object], None]
) -> None:
    calls = [
        (text, succeeded)
        for t in faulty_run.batch(PROGRAMS)
        for text, succeeded in zip(observations(t), t.tool_succeeded, strict=False)
    ]
    killed = [succeeded for text, succeeded in calls if text == KILLED]
    record_property("programs_killed", len(killed))
    assert 1 <= len(killed) <= faulty_run.killed[1]
    assert not any(killed)


def test_the_numbers_of_that_batch_are_right(faulty_run: FaultyRun) -> None:
    for trajectory in faulty_run.batch(SANDBOXES)[::8]:
        mask = trajectory.loss_mask
        assert (trajectory.weight_version[mask] == SANDBOXES).all()
        sampled = input_logprobs(faulty_run.weights, trajectory)[mask]
        np.testing.assert_allclose(trajectory.rollout_logprobs[mask], sampled, atol=1e-4)
        scored = input_logprobs(TEACHER, trajectory)[mask]
        np.testing.assert_allclose(trajectory.teacher_logprobs[mask], scored, atol=1e-4)
