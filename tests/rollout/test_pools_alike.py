"""Both pools ask the engine for the same, in the same order, and bring the same trajectories."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sod_mcore.trajectory import RecordedBatch, Trajectory
from tests.end_to_end.programs import environment, run
from tests.rollout.input_engine import InputEngine, served, write_fleet
from tests.rollout.pool_program import BATCHES

PATIENCE = 400.0


@dataclass(frozen=True)
class Played:
    """What a pool asked for and brought, playing one conversation at a time."""

    requests: list[dict[str, Any]]
    scored: list[str]
    batches: list[RecordedBatch]


def play(directory: Path, rollout: Mapping[str, Any]) -> Played:
    engine = InputEngine()
    program = [sys.executable, "-m", "tests.rollout.pool_program", str(directory)]
    with served(engine) as url:
        write_fleet(directory, url)
        run([*program, json.dumps({"concurrency": 1, **rollout})], PATIENCE)
    batches = [RecordedBatch.load(directory / f"batch_{n}.npz") for n in range(len(BATCHES))]
    # A trajectory is scored while the next one is played: only of turns the order is certain.
    return Played(engine.requests, sorted(map(json.dumps, engine.scored)), batches)


@pytest.fixture(scope="module")
def by_process(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(tmp_path_factory.mktemp("process"), {"pool": "process"})


@pytest.fixture(scope="module")
def by_ray(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(tmp_path_factory.mktemp("ray"), {"pool": "ray", "ray_actors": 1})


def test_the_test_has_something_to_compare(by_process: Played) -> None:
    trajectories = [t for batch in by_process.batches for t in batch.trajectories]
    assert len(trajectories) == sum(request.num_trajectories for request in BATCHES)
    assert {t.is_correct for t in trajectories} == {True, False}
    assert {t.num_turns for t in trajectories} > {1, 2}
    assert len(by_process.requests) == sum(t.num_turns for t in trajectories)
    assert len(by_process.scored) == sum(t.is_scored for t in trajectories) > 0


def test_requests_are_the_same_in_the_same_order(by_process: Played, by_ray: Played) -> None:
    assert by_ray.requests == by_process.requests
    assert by_ray.scored == by_process.scored


def test_trajectories_are_the_same(by_process: Played, by_ray: Played) -> None:
    for theirs, ours in zip(by_process.batches, by_ray.batches, strict=True):
        assert (ours.num_dropped, len(ours.trajectories)) == (0, len(theirs.trajectories))
        for expected, found in zip(theirs.trajectories, ours.trajectories, strict=True):
            assert_same(found, expected)


def assert_same(found: Trajectory, expected: Trajectory) -> None:
    for field in dataclasses.fields(Trajectory):
        np.testing.assert_equal(getattr(found, field.name), getattr(expected, field.name))


def test_rays_types_are_not_needed_by_the_process_pool() -> None:
    """A run with the process pool works where Ray is not installed."""
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "import pretrain_sod, sod_mcore.evaluation.benchmark, sod_mcore.rollout.open_pool\n"
        "import sod_mcore.rollout.on_ray.ray_actor, sod_mcore.rollout.on_ray.ray_driver\n"
        "import sod_mcore.rollout.on_ray.ray_handle, sod_mcore.rollout.on_ray.ray_pool"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE, env=environment())
