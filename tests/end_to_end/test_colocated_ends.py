"""A run that ends while its engines sleep: its fleet serves on, and they are awake.

One fleet of real engines; its runs end one after the other, each in the middle of its updates.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.scoring import score
from sod_mcore.serving.endpoints import read_endpoints
from sod_mcore.serving.fleet.sleep_file import read_sleep, sleep_path
from sod_mcore.serving.weights.update import weight_versions
from tests.end_to_end.conftest import colocated_configuration
from tests.end_to_end.drills import Drill, drill, send, steps_of
from tests.end_to_end.engine_drills import process_of, server
from tests.end_to_end.programs import torchrun, write_config

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

ENGINES = ("student_engine_0", "teacher_engine_0")
EPOCHS = 20
"""Enough updates to do something in the middle of them."""
BACK_SECONDS = 300.0


class RunningFleet:
    """The engines, and the settings of the runs that share them."""

    def __init__(self, it: Drill, folder: Path, tree: dict[str, Any]) -> None:
        self.it = it
        self.folder = folder
        self.tree = tree

    def train(self, name: str, steps: int = 2) -> list[str]:
        """The command of a run with a folder of its own."""
        run = {"directory": str(self.folder / name), "steps": steps, "save_every": 1}
        config = write_config(self.folder / f"{name}.yaml", {**self.tree, "run": run})
        return torchrun(2, "pretrain_sod.py", str(config))

    def wait_until_asleep(self, run: Drill) -> None:
        def is_training() -> bool:
            record = read_sleep(self.folder)  # that of a killed run stays
            return record is not None and record.is_training and not record.is_orphaned

        run.wait_until(is_training)

    def restarts(self) -> list[int]:
        return [server(self.it, name).restarts for name in ENGINES]

    def wait_until_back(self, restarts: list[int]) -> None:
        def are_back() -> bool:
            ready = all(server(self.it, name).state == "ready" for name in ENGINES)
            return ready and self.restarts() == restarts

        self.it.wait_until(are_back, BACK_SECONDS)

    def assert_awake(self) -> None:
        """Both models answer; the student with its first weights, as after a start."""
        endpoints = read_endpoints(self.folder)

        async def ask() -> None:
            async with EngineClient(endpoints, request_timeout_seconds=60.0) as client:
                for model in endpoints.models:
                    await score(client, model, [1, 2, 3, 4], 1)

        asyncio.run(ask())
        assert weight_versions(endpoints, "student", 10.0) == (0,)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    folder = tmp_path_factory.mktemp("ends")
    tree = colocated_configuration(folder)
    tree["algorithm"]["epochs"] = EPOCHS
    tree["evaluation"] = {}
    config = write_config(folder / "fleet.yaml", tree)
    command = [sys.executable, "-m", "sod_mcore.serving", str(config)]
    with drill(command, folder, folder) as it:
        it.wait_for_text("addresses written")
        yield RunningFleet(it, folder, tree)
        send(it.process, signal.SIGTERM)
        assert it.process.wait(timeout=60) == 0
    assert not sleep_path(folder).exists()


def test_a_run_that_is_asked_to_stop_wakes_them(fleet: RunningFleet) -> None:
    before = fleet.restarts()
    command = fleet.train("stopped")
    with drill(command, fleet.folder / "stopped", fleet.folder) as run:
        fleet.wait_until_asleep(run)
        send(run.process, signal.SIGTERM)
        run.process.wait(timeout=120)
        assert run.outcome().outcome == "stopped", run.output()[-3000:]
    assert read_sleep(fleet.folder) is None
    assert fleet.restarts() == before
    fleet.assert_awake()


def test_a_run_that_fails_wakes_them(fleet: RunningFleet) -> None:
    before = fleet.restarts()
    with drill(fleet.train("failed"), fleet.folder / "failed", fleet.folder) as run:
        fleet.wait_until_asleep(run)
        run.ranks()[1].kill()
        run.process.wait(timeout=120)
        assert run.outcome().outcome == "failed", run.output()[-3000:]
    assert read_sleep(fleet.folder) is None
    assert fleet.restarts() == before
    fleet.assert_awake()


def test_a_run_that_is_killed_leaves_that_to_the_fleet(fleet: RunningFleet) -> None:
    before = fleet.restarts()
    with drill(fleet.train("killed"), fleet.folder / "killed", fleet.folder) as run:
        fleet.wait_until_asleep(run)
        run.process.kill()
        for rank in run.ranks():
            rank.kill()
        run.process.wait(timeout=60)
    fleet.wait_until_back([n + 1 for n in before])
    assert "student_engine_0 was left asleep by a trainer that has ended" in fleet.it.output()
    fleet.assert_awake()


def test_an_engine_that_dies_asleep_is_back_for_the_next_rollout(fleet: RunningFleet) -> None:
    before = fleet.restarts()
    teacher = process_of(server(fleet.it, "teacher_engine_0"))
    with drill(fleet.train("bereft"), fleet.folder / "bereft", fleet.folder) as run:
        fleet.wait_until_asleep(run)
        os.kill(teacher.pid, signal.SIGKILL)
        fleet.it.wait_until(lambda: server(fleet.it, "teacher_engine_0").state == "restarting")
        record = read_sleep(fleet.folder)
        assert record is not None
        assert record.is_training, "else this test shows nothing"
        assert run.process.wait(timeout=400) == 0, run.output()[-6000:]
    assert steps_of(fleet.folder / "bereft") == [0, 1, 2]
    assert fleet.restarts() == [before[0], before[1] + 1]
    assert read_sleep(fleet.folder) is None
