"""Engines and routers that die or fall silent in a run: it goes on, and its numbers stay right.

One run of real processes; something is done to them in each of its steps but the first and last.
"""

from __future__ import annotations

import copy
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sod_mcore.serving.fleet.state import ServerState, read_fleet_state
from sod_mcore.trajectory import RecordedBatch, Trajectory, recorded_batch_path
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.drills import Drill, drill, send, steps_of, wait_for_rollout
from tests.end_to_end.engine_drills import process_of, server
from tests.end_to_end.programs import TEACHER, metrics, torchrun, write_config

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

FAULTS: tuple[tuple[str, signal.Signals], ...] = (
    ("student_engine_0", signal.SIGKILL),
    ("teacher_engine_0", signal.SIGKILL),
    ("student_router", signal.SIGKILL),
    ("student_engine_0", signal.SIGSTOP),
)
"""What is done in steps 2, 3, 4 and 5, and to which process."""
STEPS = len(FAULTS) + 2
HEALTH_SECONDS = 30.0
RECOVERED_SECONDS = 400.0


@dataclass(frozen=True)
class FaultyRun:
    """What the run left behind.

    Attributes:
        folder: of the run.
        initial: the student's weights before the first step.
        seconds: from each fault until the process was ready again.
        servers: the fleet's processes at the end, by name.
        output: all that was printed.
        exit_code: of the run.
    """

    folder: Path
    initial: Path
    seconds: tuple[float, ...]
    servers: dict[str, ServerState]
    output: str
    exit_code: int | None

    def batch(self, step: int) -> RecordedBatch:
        return RecordedBatch.load(recorded_batch_path(self.folder / "recordings", step))


@pytest.fixture(scope="module")
def faulty_run(live_run: LiveRun, tmp_path_factory: pytest.TempPathFactory) -> FaultyRun:
    folder = tmp_path_factory.mktemp("faults")
    config = write_config(folder / "sod.yaml", configuration(live_run, folder / "run"))
    record = ["--record", str(folder / "recordings")]
    train = shlex.join(torchrun(2, "pretrain_sod.py", str(config), *record))
    # The fleet's state is gone when the run is.
    keep = f"cp {folder}/run/serving/state.json {folder}/state.json"
    serve = [sys.executable, "-m", "sod_mcore.serving", str(config)]
    with drill([*serve, "--", "sh", "-c", f"{train} && {keep}"], folder / "run", folder) as it:
        seconds = []
        for step, (name, number) in enumerate(FAULTS, start=1):
            wait_for_rollout(it, step)
            seconds.append(seconds_until_back(it, name, number))
        code = it.process.wait(timeout=600)
        output = it.output()
    (folder / "serving").mkdir()
    (folder / "state.json").rename(folder / "serving" / "state.json")
    servers = {server.name: server for server in read_fleet_state(folder).servers}
    initial = Path(live_run.tree["student"]["model_path"])
    return FaultyRun(folder, initial, tuple(seconds), servers, output, code)


def configuration(live_run: LiveRun, run: Path) -> dict[str, Any]:
    tree: dict[str, Any] = copy.deepcopy(live_run.tree)
    tree["run"] = {"directory": str(run), "steps": STEPS, "save_every": 0}
    tree["algorithm"] |= {"prompts_per_step": 32, "prompts_per_mini_batch": 16, "topk": {"k": 4}}
    tree["serving"]["health_timeout_seconds"] = HEALTH_SECONDS
    tree["evaluation"] = {}
    tree["report"] = {"wandb": "disabled"}
    return tree


def seconds_until_back(it: Drill, name: str, number: signal.Signals) -> float:
    """Do something to a process of the fleet; how long it takes until it is ready again."""
    before = server(it, name)
    started = time.monotonic()
    send(process_of(before), number)
    deadline = started + RECOVERED_SECONDS

    def is_back() -> bool:
        assert time.monotonic() < deadline, it.output()[-6000:]
        now = server(it, name)
        return now.restarts == before.restarts + 1 and now.state == "ready"

    it.wait_until(is_back, seconds=RECOVERED_SECONDS)
    return time.monotonic() - started


def test_the_run_goes_on_to_its_end(
    faulty_run: FaultyRun, record_property: Callable[[str, object], None]
) -> None:
    for (name, number), seconds in zip(FAULTS, faulty_run.seconds, strict=True):
        record_property(f"{number.name}_{name}_seconds_until_back", round(seconds))
    assert faulty_run.exit_code == 0, faulty_run.output[-6000:]
    assert steps_of(faulty_run.folder / "run") == list(range(STEPS + 1))


def test_the_fleet_says_what_happened(faulty_run: FaultyRun) -> None:
    restarts = {name: server.restarts for name, server in faulty_run.servers.items()}
    expected = dict.fromkeys(restarts, 0)
    for name, _ in FAULTS:
        expected[name] += 1
    assert restarts == expected
    said = faulty_run.output
    for name in ("student_engine_0", "teacher_engine_0", "student_router"):
        assert said.count(f"{name} ended with exit code -9") == 1
    assert said.count(f"student_engine_0 did not answer for {HEALTH_SECONDS:g} s") == 1


def test_no_trajectory_is_lost(faulty_run: FaultyRun) -> None:
    for line in metrics(faulty_run.folder / "run")[1:]:
        assert line["rollout/trajectories"] == 32 * 4
        assert line["rollout/dropped"] == line["rollout/unscored"] == 0


def test_every_token_was_sampled_by_the_weights_of_its_step(faulty_run: FaultyRun) -> None:
    """The engine that came back has those of its start until it gets the trainer's."""
    for step in range(STEPS):
        assert set(faulty_run.batch(step).staleness) == {0}


@pytest.mark.parametrize("step", [1, 2])
def test_the_scores_are_the_teachers(faulty_run: FaultyRun, step: int) -> None:
    """In the steps in which the student's and the teacher's engine died."""
    teacher: Any = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    for trajectory in faulty_run.batch(step).trajectories[::8]:
        expected = logprobs(teacher, trajectory)
        scored = trajectory.loss_mask
        np.testing.assert_allclose(trajectory.teacher_logprobs[scored], expected[scored], atol=1e-4)


def logprobs(model: Any, trajectory: Trajectory) -> np.ndarray:
    """Of all tokens ``[T]``; entry 0 is NaN."""
    ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        values = model(ids).logits[0].log_softmax(-1)
    picked = values[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
    return np.concatenate([[np.nan], picked])
