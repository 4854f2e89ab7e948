"""The order in which colocated engines sleep and wake, with scripted engines that die of any other:
of a release that meets running requests or comes twice, and of a resume of what is there."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sod_mcore.config import EngineConfig, ServingConfig
from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.endpoints import Endpoints, FleetError, ModelEndpoints
from sod_mcore.serving.fleet.sleep_file import read_sleep, sleep_path
from sod_mcore.serving.fleet.state import Condition, FleetStateFile, state_path
from sod_mcore.serving.sleep import EngineSleep
from sod_mcore.serving.weights.disk_transfer import DiskTransfer
from sod_mcore.serving.weights.transfer import WeightUpdateError
from sod_mcore.serving.weights.update import (
    KV_CACHE,
    WEIGHTS,
    probe_logprobs,
    update_weights,
)
from sod_mcore.timeline import Span
from tests.serving.scripted_engines import ScriptedEngines, running_engines

STUDENT, TEACHER, TRAINER = 0, 1, 2
CLOSED = "http://127.0.0.1:9"
FALL_ASLEEP = ["pause", "release kv_cache weights"]


class Fleet:
    """A student and a teacher of one scripted engine each, and the trainer's hand on them."""

    def __init__(self, engines: ScriptedEngines, directory: Path, **settings: float) -> None:
        self.engines = engines
        self.directory = directory
        self.spans: list[Span] = []
        self.urls = list(engines.urls)
        self.states = FleetStateFile(directory)
        for index in (STUDENT, TEACHER):
            self.record(index, "ready")
        serving = ServingConfig(
            student=EngineConfig(model_path="student"),
            placement="colocated",
            **{"request_timeout_seconds": 10.0, "restart_timeout_seconds": 10.0, **settings},  # type: ignore[arg-type]
        )
        self.sleep = EngineSleep(
            self.endpoints,
            serving,
            directory,
            note=self.spans.append,
            free_memory=lambda: engines.calls.append((TRAINER, "free")),
        )

    @property
    def endpoints(self) -> Endpoints:
        folder = str(self.directory / "model")
        models = {
            name: ModelEndpoints(name, url, (url,), folder, 64, 100)
            for name, url in zip(("student", "teacher"), self.urls, strict=True)
        }
        return Endpoints("http://127.0.0.1:9", models, 1, 1, "elsewhere")

    def record(self, index: int, state: Condition, restarts: int = 0) -> None:
        name = ("student", "teacher")[index]
        self.states.record(f"{name}_engine_0", name, "engine", self.urls[index], state, restarts)

    def update(self, version: int) -> None:
        transfer = DiskTransfer(self.directory / "model")
        update_weights(self.endpoints, "student", transfer, version, 10, sleep=self.sleep)

    def wake(self, version: int) -> None:
        self.sleep.end_training()
        self.update(version)
        self.sleep.wake_others()

    def calls(self, index: int) -> list[str]:
        """The calls to one engine since the last time."""
        calls = self.engines.calls_of(index)
        self.engines.calls = [(i, call) for i, call in self.engines.calls if i != index]
        return calls


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"weight": np.ones(3, np.float32)}, tmp_path / "model" / "model.safetensors")
    with running_engines(ScriptedEngines(notes_questions=True)) as engines:
        yield Fleet(engines, tmp_path)
        assert "die" not in engines.call_names()


def test_the_order_of_a_step(fleet: Fleet) -> None:
    for version in (1, 2):
        fleet.sleep.sleep()
        assert fleet.engines.released == [{"kv_cache", "weights"}] * 2
        fleet.wake(version)
        probe_logprobs(fleet.endpoints, "student", [1, 2, 3], 10)
        assert fleet.calls(STUDENT) == [
            *FALL_ASLEEP,
            *("pause", "resume weights", "update and flush", "version", "resume kv_cache"),
            *("continue", "generate"),
        ]
        assert fleet.calls(TEACHER) == [
            *FALL_ASLEEP,
            *("resume weights", "resume kv_cache", "continue"),
        ]
    assert fleet.engines.versions == ["2", "default"]


def test_the_teacher_wakes_when_the_student_has_its_weights(fleet: Fleet) -> None:
    """The trainer's buckets need room until then."""
    fleet.sleep.sleep()
    fleet.wake(1)
    order = [call for _, call in fleet.engines.calls]
    teachers = fleet.engines.calls.index((TEACHER, "resume weights"))
    assert order.index("continue") < teachers
    assert fleet.engines.calls[teachers - 1] == (STUDENT, "continue")


def test_the_trainer_frees_its_memory_before_the_cache_comes(fleet: Fleet) -> None:
    fleet.sleep.sleep()
    fleet.wake(1)
    place = fleet.engines.calls.index((STUDENT, "resume kv_cache"))
    assert fleet.engines.calls[place - 1] == (TRAINER, "free")
    assert fleet.calls(TRAINER) == ["free"]


def test_an_update_of_engines_that_are_awake(fleet: Fleet) -> None:
    """As the first one of a run, or one in the middle of a rollout."""
    fleet.wake(1)
    assert fleet.calls(STUDENT) == ["pause", "update and flush", "version", "continue"]
    assert not fleet.calls(TEACHER)
    assert not fleet.spans
    assert not sleep_path(fleet.directory).exists()


def test_the_fleet_is_told_who_is_asleep(fleet: Fleet) -> None:
    fleet.record(TEACHER, "ready", restarts=2)
    fleet.sleep.sleep()
    record = read_sleep(fleet.directory)
    assert record is not None
    assert record.is_training
    assert record.pid == os.getpid()
    assert not record.is_orphaned
    assert record.engines == {fleet.urls[STUDENT]: 1, fleet.urls[TEACHER]: 3}
    fleet.sleep.end_training()
    record = read_sleep(fleet.directory)
    assert record is not None
    assert not record.is_training
    assert len(record.engines) == 2
    fleet.update(1)
    record = read_sleep(fleet.directory)
    assert record is not None
    assert record.engines == {fleet.urls[TEACHER]: 3}
    fleet.sleep.wake_others()
    assert read_sleep(fleet.directory) is None


def test_a_trainer_that_has_ended_is_told_from_one_that_works(fleet: Fleet) -> None:
    fleet.sleep.sleep()
    tree = json.loads(sleep_path(fleet.directory).read_text())
    other = subprocess.Popen([sys.executable, "-c", "pass"])
    other.wait()
    sleep_path(fleet.directory).write_text(json.dumps({**tree, "pid": other.pid}))
    record = read_sleep(fleet.directory)
    assert record is not None
    assert record.is_orphaned


@pytest.mark.parametrize("index", [STUDENT, TEACHER])
def test_an_engine_that_was_started_again_is_awake(fleet: Fleet, index: int) -> None:
    """It died while the trainer worked, and came back when the GPUs were free: it gets weights like
    any other, and SGLang would die of being woken."""
    fleet.sleep.sleep()
    fleet.engines.released[index], fleet.engines.are_paused[index] = set(), False
    fleet.record(index, "restarting", restarts=0)
    fleet.record(index, "ready", restarts=1)
    fleet.calls(index)
    fleet.wake(1)
    expected = ["pause", "update and flush", "version", "continue"] if index == STUDENT else []
    assert fleet.calls(index) == expected
    assert read_sleep(fleet.directory) is None
    fleet.sleep.sleep()
    assert fleet.calls(index) == FALL_ASLEEP
    assert fleet.engines.released == [{"kv_cache", "weights"}] * 2


def test_an_engine_that_is_being_started_again_is_waited_for(fleet: Fleet) -> None:
    """The trainer must not begin beside an engine that comes up a moment later."""
    fleet.record(TEACHER, "restarting")
    back = threading.Timer(0.3, lambda: fleet.record(TEACHER, "ready", restarts=1))
    back.start()
    fleet.sleep.sleep()
    back.join()
    assert fleet.calls(TEACHER) == FALL_ASLEEP


def test_an_engine_that_does_not_come_back(fleet: Fleet) -> None:
    fleet.record(TEACHER, "restarting")
    impatient = Fleet(fleet.engines, fleet.directory, restart_timeout_seconds=0.1)
    impatient.record(TEACHER, "restarting")
    with pytest.raises(FleetError, match=rf"{fleet.urls[TEACHER]}: not ready within .*=0\.1"):
        impatient.sleep.sleep()
    assert not fleet.engines.calls
    assert read_sleep(fleet.directory) is None


def test_a_stop_ends_that_wait(fleet: Fleet) -> None:
    fleet.record(TEACHER, "restarting")
    fleet.sleep._should_stop = lambda: True
    fleet.sleep.sleep()
    assert not fleet.engines.calls


def test_an_engine_that_refuses_to_sleep(fleet: Fleet) -> None:
    fleet.engines.sleepless = TEACHER
    with pytest.raises(FleetError) as found:
        fleet.sleep.sleep()
    message = str(found.value)
    assert f"teacher: {fleet.urls[TEACHER]} does not release its memory" in message
    assert "serving.placement=colocated" in message
    assert "no memory saver" in message
    fleet.sleep.close()
    assert fleet.engines.released == [set(), set()]
    assert fleet.engines.are_paused == [False, False]
    assert fleet.calls(TEACHER) == ["pause", "continue"]


def test_an_engine_that_dies_when_it_is_to_sleep(fleet: Fleet) -> None:
    """Its memory is free, and the fleet starts it again when that may be used."""
    fleet.urls[TEACHER] = CLOSED
    gone = Fleet(fleet.engines, fleet.directory)
    gone.urls[TEACHER] = CLOSED
    gone.record(TEACHER, "ready")
    gone.sleep._endpoints = gone.endpoints
    noticed = threading.Timer(1.0, lambda: gone.record(TEACHER, "restarting"))
    noticed.start()
    gone.sleep.sleep()
    noticed.join()
    record = read_sleep(fleet.directory)
    assert record is not None
    assert record.is_training
    assert record.engines == {fleet.urls[STUDENT]: 1}
    gone.wake(1)
    assert read_sleep(fleet.directory) is None


def test_a_connection_that_breaks_is_no_death(fleet: Fleet) -> None:
    """The process lives, as far as its fleet knows: its memory may be as it was."""
    alive = Fleet(fleet.engines, fleet.directory)
    alive.urls[TEACHER] = CLOSED
    alive.record(TEACHER, "ready")
    alive.sleep._endpoints = alive.endpoints
    with pytest.raises(FleetError, match=f"teacher: {CLOSED} does not release its memory"):
        alive.sleep.sleep()
    record = read_sleep(fleet.directory)
    assert record is not None
    assert CLOSED in record.engines, "the fleet starts it again when this process ends"


def test_it_is_on_the_record_until_it_answers(fleet: Fleet) -> None:
    """A trainer that dies between the wake and the end of the pause leaves that to the fleet."""
    fleet.sleep.sleep()
    fleet.sleep.end_training()
    url = fleet.urls[STUDENT]

    async def wake() -> None:
        async with EngineClient(fleet.endpoints, keep_alive=False) as client:
            await fleet.sleep.wake(client, [url], WEIGHTS)
            fleet.sleep.are_awake([url])
            await fleet.sleep.wake(client, [url], KV_CACHE)

    asyncio.run(wake())
    record = read_sleep(fleet.directory)
    assert record is not None
    assert url in record.engines
    fleet.sleep.are_awake([url])
    record = read_sleep(fleet.directory)
    assert record is not None
    assert url not in record.engines
    fleet.sleep.close()


def test_an_update_that_fails_half_way_is_mended_by_the_next(fleet: Fleet) -> None:
    """The weights' memory is there by then, the cache's is not."""
    fleet.sleep.sleep()
    fleet.sleep.end_training()
    fleet.engines.refusing = STUDENT
    with pytest.raises(WeightUpdateError, match="version 1 not loaded"):
        fleet.update(1)
    assert fleet.engines.released[STUDENT] == {"kv_cache"}
    fleet.engines.refusing = None
    fleet.calls(STUDENT)
    fleet.update(1)
    assert fleet.calls(STUDENT) == [
        *("pause", "update and flush", "version", "resume kv_cache", "continue")
    ]


def test_a_teacher_that_does_not_wake(fleet: Fleet) -> None:
    fleet.sleep.sleep()
    fleet.engines.cacheless = TEACHER
    with pytest.raises(FleetError) as found:
        fleet.wake(1)
    expected = f"teacher: {fleet.urls[TEACHER]} does not take its memory back"
    assert str(found.value).startswith(expected)
    fleet.engines.cacheless = None
    fleet.sleep.close()
    assert fleet.calls(TEACHER)[-3:] == ["resume weights", "resume kv_cache", "continue"]


def test_one_of_two_engines_that_wake_fails(fleet: Fleet) -> None:
    """The next try, as after a death, finds the other one awake but for its requests."""
    first, second = fleet.urls
    both = ModelEndpoints("student", first, (first, second), str(fleet.directory / "model"), 64, 9)
    endpoints = Endpoints("http://127.0.0.1:9", {"student": both}, 1, 1, "elsewhere")
    fleet.states.record("teacher_engine_0", "student", "engine", second, "ready", 0)
    serving = ServingConfig(student=EngineConfig(model_path=""), placement="colocated")
    sleep = EngineSleep(endpoints, serving, fleet.directory)
    transfer = DiskTransfer(fleet.directory / "model")
    sleep.sleep()
    sleep.end_training()
    fleet.engines.cacheless = 1
    with pytest.raises(WeightUpdateError, match="out of memory"):
        update_weights(endpoints, "student", transfer, 1, 10, sleep=sleep)
    fleet.engines.cacheless = None
    update_weights(endpoints, "student", transfer, 1, 10, sleep=sleep)
    assert fleet.engines.released == [set(), set()]
    assert fleet.engines.are_paused == [False, False]
    assert read_sleep(fleet.directory) is None


@pytest.mark.parametrize("is_half_awake", [False, True])
def test_the_end_of_a_run_leaves_the_fleet_awake(fleet: Fleet, is_half_awake: bool) -> None:
    """Asked to stop, or failed, while the engines sleep: they are as after their start."""
    fleet.update(3)
    fleet.sleep.sleep()
    if is_half_awake:
        fleet.engines.refusing = STUDENT
        with pytest.raises(WeightUpdateError):
            fleet.update(4)
        fleet.engines.refusing = None
    fleet.sleep.close()
    assert fleet.engines.released == [set(), set()]
    assert fleet.engines.are_paused == [False, False]
    assert fleet.engines.versions == ["0", "default"]
    assert read_sleep(fleet.directory) is None


def test_the_end_of_a_run_whose_engines_are_awake(fleet: Fleet) -> None:
    fleet.sleep.sleep()
    fleet.wake(3)
    fleet.engines.calls.clear()
    fleet.sleep.close()
    assert not fleet.engines.calls
    assert fleet.engines.versions[STUDENT] == "3"


def test_the_end_of_a_run_whose_fleet_has_ended(fleet: Fleet) -> None:
    fleet.sleep.sleep()
    state_path(fleet.directory).unlink()
    fleet.engines.calls.clear()
    fleet.sleep.close()
    assert not fleet.engines.calls


def test_the_spans_of_a_step(fleet: Fleet) -> None:
    fleet.sleep.sleep()
    fleet.wake(1)
    assert [(span.kind, span.lane) for span in fleet.spans] == [
        ("engines_asleep", 1),
        *[("engine_wake", 0)] * 3,
    ]
    asleep, *wakes = fleet.spans
    assert asleep.start <= asleep.end <= wakes[0].start
    for span in wakes:
        assert span.start < span.end
