"""Which prompts a step gets, when they are submitted, and how old its tokens may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from pydantic import TypeAdapter

from sod_mcore.config import SodConfig
from sod_mcore.data.prompts import PromptSource
from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.loop.stop import StopRequest
from sod_mcore.loop.trajectory_source import LiveSource, ReplaySource
from sod_mcore.rollout.pool import RolloutError, RolloutInterruptedError, Ticket
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.rollout.token_recorder import TokenRecorder
from sod_mcore.serving.endpoints import Endpoints, ModelEndpoints
from sod_mcore.serving.fleet.state import FleetStateFile
from sod_mcore.trajectory import Prompt, Trajectory
from tests.rollout.idle_pool import IdlePool

STEPS = 5
STUDENT = Endpoints(
    "http://door:1",
    {"student": ModelEndpoints("student", "http://a:1", ("http://a:1",), "folder", 64, 100)},
    *(1, 1, "elsewhere"),
)
PROMPTS = tuple(Prompt((), "", "s", f"p{i}") for i in range(20))


class VersionedPool(IdlePool):
    """Samples each batch with the weights of its submission, and tells when that was."""

    def __init__(self) -> None:
        self.version = 0
        self.submitted: list[tuple[int, RolloutRequest]] = []

    def submit(self, request: RolloutRequest) -> Ticket:
        self.submitted.append((self.version, request))
        return len(self.submitted) - 1

    def collect(
        self,
        ticket: Ticket,
        timeout_seconds: float,
        on_progress: Callable[[RolloutProgress], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> RolloutResult:
        if should_stop():
            raise RolloutInterruptedError
        version, request = self.submitted[ticket]
        wanted = len(request.prompts) - request.spare_prompts
        trajectories = [sampled(prompt, version) for prompt in request.prompts[:wanted]]
        return RolloutResult(tuple(trajectories), 0, 0, num_retries=ticket, failures=())


def sampled(prompt: Prompt, version: int) -> Trajectory:
    recorder = TokenRecorder(np.array([1], np.int32))
    recorder.append_turn(
        np.array([2], np.int32), np.array([-1.0], np.float32), np.array([version], np.int32)
    )
    return recorder.to_trajectory(group_id=prompt.prompt_id, reward=0.0, is_correct=False)


def live_source(pool: VersionedPool, folder: Path, **rollout: int) -> LiveSource:
    tree = {
        "run": {"directory": str(folder), "steps": STEPS, "record": str(folder / "recorded")},
        "student": {"model_path": "student"},
        "data": {"train": "train.parquet"},
        "algorithm": {"prompts_per_step": 3, "group_size": 1, "prompts_per_mini_batch": 3},
        "rollout": rollout,
    }
    config = TypeAdapter(SodConfig).validate_python(tree)
    source = PromptSource(PROMPTS, seed=1)
    # A StopRequest proper takes the signals of the process.
    stop = cast(StopRequest, SimpleNamespace(reason=None))
    watch = EngineWatch(folder / "no_fleet", patience_seconds=0.0)
    return LiveSource(pool, source, config, stop, watch)


def run_steps(source: LiveSource, pool: VersionedPool, first_step: int = 0) -> list[list[str]]:
    """As the loop does: collect, train, publish; returns the prompts of each step."""
    prompts = []
    for step in range(first_step, STEPS):
        pool.version = step
        source.weights_are_published(step)
        batch = source.batch(step, weight_version=step)
        prompts.append([t.group_id for t in batch.trajectories])
    return prompts


@pytest.mark.parametrize("ahead", [0, 1, 2, STEPS + 3])
@pytest.mark.parametrize("first_step", [0, 2])
def test_every_step_has_the_prompts_of_the_synchronous_loop(
    ahead: int, first_step: int, tmp_path: Path
) -> None:
    pool = VersionedPool()
    prompts = run_steps(live_source(pool, tmp_path, max_staleness=ahead), pool, first_step)
    assert prompts == [
        [prompt.prompt_id for prompt in PromptSource(PROMPTS, seed=1).batch(step, 3)]
        for step in range(first_step, STEPS)
    ]
    assert len(pool.submitted) == STEPS - first_step, "each step once, none beyond the last"


def test_a_step_is_submitted_with_the_weights_of_so_many_steps_before(tmp_path: Path) -> None:
    pool = VersionedPool()
    run_steps(live_source(pool, tmp_path, max_staleness=2), pool)
    assert [version for version, _ in pool.submitted] == [0, 0, 0, 1, 2]
    recorded = ReplaySource(tmp_path / "recorded")
    staleness = [int(recorded.batch(step, step).staleness.max()) for step in range(STEPS)]
    assert staleness == [0, 1, 2, 2, 2]
    assert [recorded.batch(step, step).num_retries for step in range(STEPS)] == [0, 1, 2, 3, 4]


def test_what_may_be_sampled_begins_when_the_weights_are_there(tmp_path: Path) -> None:
    """And not when the step is asked for: an evaluation or a checkpoint may lie between."""
    pool = VersionedPool()
    ahead, synchronous = (live_source(pool, tmp_path, max_staleness=n) for n in (2, 0))
    ahead.weights_are_published(0)
    assert len(pool.submitted) == 3
    synchronous.weights_are_published(0)
    assert len(pool.submitted) == 3


def test_a_batch_that_was_interrupted_is_asked_for_again(tmp_path: Path) -> None:
    """Its conversations go on: nothing is submitted twice."""
    pool, fleet = VersionedPool(), FleetStateFile(tmp_path / "no_fleet")
    source = live_source(pool, tmp_path)
    fleet.record("student_engine_0", "student", "engine", "http://a:1", "ready", 0)
    source.watch.begin_update(STUDENT, "student", 0)
    fleet.record("student_engine_0", "student", "engine", "http://a:1", "ready", 1)
    with pytest.raises(RolloutInterruptedError):
        source.batch(0, weight_version=0)
    source.watch.begin_update(STUDENT, "student", 0)
    assert len(source.batch(0, weight_version=0).trajectories) == 3
    assert len(pool.submitted) == 1


def test_tokens_of_an_engine_that_lost_its_weights_are_refused(tmp_path: Path) -> None:
    pool = VersionedPool()
    source = live_source(pool, tmp_path, max_staleness=1)
    source.batch(0, weight_version=0)
    with pytest.raises(RolloutError, match=r"2 versions older.*max_staleness allows 1"):
        source.batch(1, weight_version=2)


def test_spare_prompts_are_submitted_and_do_not_count_as_lost(tmp_path: Path) -> None:
    pool = VersionedPool()
    batch = live_source(pool, tmp_path, spare_prompts=4).batch(0, weight_version=0)
    ((_, request),) = pool.submitted
    assert (len(request.prompts), request.spare_prompts, len(batch.trajectories)) == (7, 4, 3)
