"""The trainer's view of a fleet whose engines die and come back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.serving.endpoints import Endpoints, FleetError, ModelEndpoints, write_endpoints
from sod_mcore.serving.fleet.state import Condition, FleetStateFile, state_path

CLOSED = "http://127.0.0.1:9"
OURS = ("http://ours:1", "http://ours:2")


def fleet(*engines: str) -> Endpoints:
    models = {
        name: ModelEndpoints(name, engines[0], engines, "folder", 64, 100)
        for name in ("student", "teacher")
    }
    return Endpoints("http://door:1", models, 1, 1, "elsewhere")


def begin(watch: EngineWatch, endpoints: Endpoints, version: int = 1) -> Endpoints:
    ready = watch.begin_update(endpoints, "student", version)
    assert ready is not None
    return ready


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
    ready = begin(watch, fleet(*OURS))
    assert ready.model("student").engines == OURS[1:]
    assert ready.model("teacher").engines == OURS, "another model's engines are not touched"


def test_an_engine_that_was_started_again_elsewhere_gets_the_weights(
    tmp_path: Path, file: FleetStateFile
) -> None:
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    begin(watch, fleet(*OURS))
    moved = "http://other_node:1"
    file.record("student_0", "student", "engine", moved, "ready", 1)
    write_endpoints(fleet(moved, OURS[1]), tmp_path)
    assert watch.is_weightless()
    assert begin(watch, fleet(*OURS)).model("student").engines == (moved, OURS[1])
    assert not watch.is_weightless()


def test_an_engine_that_comes_back_is_missed_until_it_has_the_weights(
    tmp_path: Path, file: FleetStateFile
) -> None:
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    assert not watch.is_weightless(), "nothing was sent yet, so nothing is missing"
    begin(watch, fleet(*OURS))
    assert not watch.is_weightless()
    record(file, 0, "restarting")
    assert not watch.is_weightless(), "it could not take them now"
    record(file, 0, "ready", restarts=1)
    assert watch.is_weightless()
    begin(watch, fleet(*OURS))
    assert not watch.is_weightless()


def test_an_engine_that_was_away_during_the_update_is_missed(
    tmp_path: Path, file: FleetStateFile
) -> None:
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    record(file, 0, "restarting")
    begin(watch, fleet(*OURS))
    record(file, 0, "ready", restarts=1)
    assert watch.is_weightless()


def test_the_router_and_other_models_need_no_weights(tmp_path: Path, file: FleetStateFile) -> None:
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    begin(watch, fleet(*OURS))
    file.record("router", "student", "router", "http://router:1", "ready", 6)
    file.record("teacher_0", "teacher", "engine", "http://ours:3", "ready", 1)
    assert not watch.is_weightless()


@contextmanager
def engine_of_others(versions: list[int]) -> Iterator[str]:
    """An engine whose state is not known here; it reports the last of ``versions``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/model_info"
            body = json.dumps({"weight_version": str(versions[-1])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_engines_of_others_are_asked(tmp_path: Path, file: FleetStateFile) -> None:
    versions = [3]
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    record(file, 0, "restarting")
    with engine_of_others(versions) as theirs:
        mixed = fleet(OURS[0], theirs, CLOSED)
        assert begin(watch, mixed, version=3).model("student").engines == (theirs,)
        record(file, 1, "restarting")
        assert not watch.is_weightless()
        versions.append(0)  # it was started again
        deadline = time.monotonic() + 60
        while not watch.is_weightless():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        begin(watch, mixed, version=3)
        versions.append(3)
        assert not watch.is_weightless()
    with pytest.raises(FleetError):
        begin(watch, fleet(theirs), version=3)


def test_it_waits_for_the_only_engine(tmp_path: Path, file: FleetStateFile) -> None:
    for index in range(2):
        record(file, index, "restarting")
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    with pytest.raises(FleetError, match=r"no engine of student was ready within .*=0; raise it"):
        begin(watch, fleet(*OURS))
    back = threading.Timer(0.2, lambda: record(file, 1, "ready", restarts=1))
    back.start()
    patient = EngineWatch(tmp_path, patience_seconds=60.0)
    assert begin(patient, fleet(*OURS)).model("student").engines == OURS[1:]
    back.join()


def test_a_stop_ends_the_wait(tmp_path: Path, file: FleetStateFile) -> None:
    for index in range(2):
        record(file, index, "restarting")
    watch = EngineWatch(tmp_path, patience_seconds=600.0, should_stop=lambda: True)
    assert watch.begin_update(fleet(*OURS), "student", 1) is None


def test_nobody_waits_for_engines_that_were_given_up(tmp_path: Path, file: FleetStateFile) -> None:
    for index in range(2):
        record(file, index, "given up", restarts=3)
    watch = EngineWatch(tmp_path, patience_seconds=600.0)
    with pytest.raises(FleetError, match="every engine of student has died too often"):
        begin(watch, fleet(*OURS))


def test_restarts_count_from_the_beginning_of_the_run(tmp_path: Path, file: FleetStateFile) -> None:
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    assert watch.restarts() == 0, "the router had died before"
    record(file, 0, "ready", restarts=2)
    assert watch.restarts() == 2
    state_path(tmp_path).unlink()
    assert watch.restarts() == 0, "a fleet that has ended tells nothing"
