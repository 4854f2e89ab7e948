"""The trainer's view of a fleet whose engines die and come back."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.serving.fleet import Endpoints, FleetError, ModelEndpoints
from sod_mcore.serving.fleet_state import Condition, FleetStateFile

OURS = ("http://ours:1", "http://ours:2")


def fleet(*engines: str) -> Endpoints:
    models = {
        name: ModelEndpoints(name, engines[0], engines, "folder", 64, 100)
        for name in ("student", "teacher")
    }
    return Endpoints("http://door:1", models, 1, 1, "elsewhere")


def record(file: FleetStateFile, index: int, state: Condition, restarts: int = 0) -> None:
    file.record(f"student_{index}", "student", "engine", OURS[index], state, restarts)


@pytest.fixture
def file(tmp_path: Path) -> FleetStateFile:
    """Two engines of the student, both ready."""
    file = FleetStateFile(tmp_path)
    for index in range(2):
        record(file, index, "ready")
    file.record("router", "student", "router", "http://router:1", "ready", 5)
    return file


def test_weights_go_to_the_engines_that_are_ready(tmp_path: Path, file: FleetStateFile) -> None:
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    record(file, 0, "restarting")
    ready = watch.begin_update(fleet(*OURS), "student")
    assert ready.model("student").engines == OURS[1:]
    assert ready.model("teacher").engines == OURS, "another model's engines are not touched"


def test_an_engine_that_comes_back_is_missed_until_it_has_the_weights(
    tmp_path: Path, file: FleetStateFile
) -> None:
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    assert not watch.is_weightless(), "nothing was sent yet, so nothing is missing"
    watch.begin_update(fleet(*OURS), "student")
    assert not watch.is_weightless()
    record(file, 0, "restarting")
    assert not watch.is_weightless(), "it could not take them now"
    record(file, 0, "ready", restarts=1)
    assert watch.is_weightless()
    watch.begin_update(fleet(*OURS), "student")
    assert not watch.is_weightless()


def test_an_engine_that_was_away_during_the_update_is_missed(
    tmp_path: Path, file: FleetStateFile
) -> None:
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    record(file, 0, "restarting")
    watch.begin_update(fleet(*OURS), "student")
    record(file, 0, "ready", restarts=1)
    assert watch.is_weightless()


def test_the_router_and_other_models_need_no_weights(tmp_path: Path, file: FleetStateFile) -> None:
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    watch.begin_update(fleet(*OURS), "student")
    file.record("router", "student", "router", "http://router:1", "ready", 6)
    file.record("teacher_0", "teacher", "engine", "http://ours:3", "ready", 1)
    assert not watch.is_weightless()


def test_engines_of_others_count_as_ready(tmp_path: Path, file: FleetStateFile) -> None:
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    record(file, 0, "restarting")
    mixed = (OURS[0], "http://theirs:1")
    assert watch.begin_update(fleet(*mixed), "student").model("student").engines == mixed[1:]
    alone = EngineWatch(tmp_path / "no_fleet", patience_seconds=0.0)
    assert alone.begin_update(fleet(*OURS), "student") == fleet(*OURS)
    assert not alone.is_weightless()


def test_it_waits_for_the_only_engine(tmp_path: Path, file: FleetStateFile) -> None:
    for index in range(2):
        record(file, index, "restarting")
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    with pytest.raises(FleetError, match=r"no engine of student was ready within .*=0;"):
        watch.begin_update(fleet(*OURS), "student")
    back = threading.Timer(0.2, lambda: record(file, 1, "ready", restarts=1))
    back.start()
    patient = EngineWatch(tmp_path, patience_seconds=60.0)
    assert patient.begin_update(fleet(*OURS), "student").model("student").engines == OURS[1:]
    back.join()
