"""Start, stop and death of a fleet, with real processes in place of SGLang's."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from sod_mcore.outcome import Outcome, write_outcome
from sod_mcore.serving.endpoints import (
    Endpoints,
    FleetError,
    endpoints_path,
    read_endpoints,
    write_endpoints,
)
from sod_mcore.serving.fleet.launch import free_port
from sod_mcore.serving.fleet.state import read_fleet_state
from tests.serving.processes import Process, descendants, leader_at, wait_until_gone

REPOSITORY = Path(__file__).parents[3]
SECONDS = 60.0


@dataclasses.dataclass
class Setup:
    """A configuration file whose models and interpreter are fakes."""

    folder: Path
    settings: dict[str, Any]

    @property
    def directory(self) -> Path:
        return self.folder / "run"

    def model(self, name: str) -> Path:
        return self.folder / name

    @contextmanager
    def serve(self, *command: str, overrides: tuple[str, ...] = ()) -> Iterator[Serving]:
        config = self.folder / "config.yaml"
        config.write_text(yaml.safe_dump(self.settings))
        log = self.folder / f"serving_{time.monotonic_ns()}.log"
        arguments = [str(config), *overrides, *(("--", *command) if command else ())]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "sod_mcore.serving", *arguments],
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Serving(process, log, self.directory)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=SECONDS)


@dataclasses.dataclass
class Serving:
    """A running ``python -m sod_mcore.serving``."""

    process: subprocess.Popen[bytes]
    log: Path
    directory: Path

    def wait(self) -> int:
        return self.process.wait(timeout=SECONDS)

    def wait_until_served(self) -> Endpoints:
        self.wait_for(endpoints_path(self.directory))
        return read_endpoints(self.directory)

    def wait_for(self, file: Path) -> None:
        self.wait_until(file.exists)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def family(self) -> set[Process]:
        return descendants(self.process.pid)

    def text(self) -> str:
        return self.log.read_text()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    python = tmp_path / "python"
    program = Path(__file__).parents[1] / "fake_sglang.py"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n')
    python.chmod(0o755)
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        shape = {
            "vocab_size": 50,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "max_position_embeddings": 99,
        }
        (tmp_path / name / "config.json").write_text(json.dumps(shape))
        (tmp_path / name / "weights").write_text(name)
    serving = {
        "python": str(python),
        "device": "cpu",
        "student": {"model_path": str(tmp_path / "student"), "engines": 2},
        "teacher": {"model_path": str(tmp_path / "teacher")},
        "start_timeout_seconds": SECONDS,
    }
    return Setup(
        tmp_path,
        {
            "run": {"directory": str(tmp_path / "run")},
            "student": {"model_path": str(tmp_path / "student")},
            "data": {"train": "unused.parquet"},
            "serving": serving,
        },
    )


def test_serves_until_stopped(setup: Setup) -> None:
    with setup.serve() as serving:
        endpoints = serving.wait_until_served()
        assert sorted(endpoints.models) == ["student", "teacher"]
        student = endpoints.model("student")
        assert len(student.engines) == 2
        assert student.route not in student.engines
        assert (student.context_length, student.vocab_size) == (77, 50)
        assert endpoints.pid == serving.process.pid
        family = serving.family()
        assert len(family) >= 3 * 2 + 2 + 1, "engines with their children, routers, watchdog"
        serving.process.send_signal(signal.SIGTERM)
        assert serving.wait() == 0
    assert not wait_until_gone(family, 0)
    with pytest.raises(FleetError, match="does not exist"):
        read_endpoints(setup.directory)


def test_which_gpus_engines_see_is_on_record(setup: Setup) -> None:
    """For a trainer whose memory they are to read."""
    on_gpus = ("serving.device=cuda", "serving.student.gpus=[1,2]", "serving.teacher.gpus=[0]")
    with setup.serve(overrides=(*on_gpus, "serving.weight_sync=cuda_ipc")) as serving:
        serving.wait_until_served()
        servers = {server.name: server for server in read_fleet_state(setup.directory).servers}
        for name, expected in {"student_engine_0": "1,0", "student_engine_1": "2,0"}.items():
            leader = leader_at(serving.process.pid, servers[name].url)
            environment = psutil.Process(leader).environ()
            assert servers[name].visible_gpus == environment["CUDA_VISIBLE_DEVICES"] == expected
        assert servers["teacher_engine_0"].visible_gpus == "0"
        assert servers["student_router"].visible_gpus is None


def test_nothing_survives_a_kill(setup: Setup) -> None:
    with setup.serve() as serving:
        serving.wait_until_served()
        family = serving.family()
        serving.process.kill()
        serving.wait()
    assert not wait_until_gone(family, 30)
    with pytest.raises(FleetError, match="are gone"):
        read_endpoints(setup.directory)


def test_an_engine_that_ignores_the_stop_is_killed(setup: Setup) -> None:
    (setup.model("teacher") / "ignores_sigterm").touch()
    with setup.serve() as serving:
        serving.wait_until_served()
        family = serving.family()
        serving.process.send_signal(signal.SIGINT)
        assert serving.wait() == 0
    assert not wait_until_gone(family, 0)


def test_a_stop_during_the_start(setup: Setup) -> None:
    (setup.model("teacher") / "never_ready").touch()
    with setup.serve() as serving:
        serving.wait_for(setup.directory / "serving" / "teacher_engine_0.log")
        family = serving.family()
        serving.process.send_signal(signal.SIGTERM)
        assert serving.wait() == 128 + signal.SIGTERM
    assert not wait_until_gone(family, 0)


def test_a_command_and_its_exit_code(setup: Setup) -> None:
    copy = setup.folder / "copy.json"
    script = f"cp {endpoints_path(setup.directory)} {copy}; exit 7"
    with setup.serve("sh", "-c", script) as serving:
        assert serving.wait() == 7
    assert json.loads(copy.read_text())["models"]["student"]["vocab_size"] == 50
    assert not endpoints_path(setup.directory).exists()


@pytest.mark.parametrize(("outcome", "code"), [("stopped", 75), ("finished", 1), ("failed", 1)])
def test_a_stopped_run_has_an_exit_code_of_its_own(setup: Setup, outcome: str, code: int) -> None:
    """torchrun ends with 1 after a signal, whatever its ranks did."""
    setup.directory.mkdir()
    record = json.dumps({"outcome": outcome, "completed_steps": 3, "reason": "told to"})
    script = f"echo '{record}' > {setup.directory}/ended.json; exit 1"
    with setup.serve("sh", "-c", script) as serving:
        assert serving.wait() == code


def test_an_earlier_stop_is_not_this_commands(setup: Setup) -> None:
    write_outcome(setup.directory, Outcome("stopped", 3, "told to"))
    with setup.serve("sh", "-c", "exit 7") as serving:
        assert serving.wait() == 7


def test_signals_reach_the_command(setup: Setup) -> None:
    began = setup.folder / "began"
    script = f"trap 'exit 9' USR1; touch {began}; while :; do sleep 0.1; done"
    with setup.serve("sh", "-c", script) as serving:
        serving.wait_for(began)
        serving.process.send_signal(signal.SIGUSR1)
        assert serving.wait() == 9


def test_a_command_that_dies_of_a_signal(setup: Setup) -> None:
    with setup.serve("sh", "-c", "kill -KILL $$") as serving:
        assert serving.wait() == 128 + signal.SIGKILL


def test_an_engine_that_dies_while_serving(setup: Setup) -> None:
    """Without restarts everything ends, the command too, and the message says which and why."""
    with setup.serve("sleep", "600", overrides=("serving.max_restarts=0",)) as serving:
        endpoints = serving.wait_until_served()
        family = serving.family()
        (setup.model("teacher") / "die_later").touch()
        port = int(endpoints.model("teacher").engines[0].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert serving.wait() == 1
    assert "teacher_engine_0 ended with exit code 3" in serving.text()
    assert "the device fell off the bus" in serving.text()
    assert not wait_until_gone(family, 0)


def test_an_engine_that_dies_at_the_start(setup: Setup) -> None:
    (setup.model("student") / "die_at_start").touch()
    with setup.serve() as serving:
        assert serving.wait() == 1
    assert "not enough memory for this model" in serving.text()
    assert not endpoints_path(setup.directory).exists()


@pytest.mark.parametrize("name", ["port_taken", "port_taken_stays"])
def test_a_lost_port_is_replaced(setup: Setup, name: str) -> None:
    (setup.model("teacher") / name).touch()
    with setup.serve("true") as serving:
        assert serving.wait() == 0
    assert "starting again on another" in serving.text()


def test_a_port_that_an_engine_wants_inside_is_its_own_affair(setup: Setup) -> None:
    (setup.model("teacher") / "inner_port_taken").touch()
    with setup.serve("true") as serving:
        assert serving.wait() == 0
    assert "starting again" not in serving.text()


def test_an_engine_that_is_never_ready(setup: Setup) -> None:
    (setup.model("teacher") / "never_ready").touch()
    with setup.serve(overrides=("serving.start_timeout_seconds=3",)) as serving:
        assert serving.wait() == 1
    assert "not ready within serving.start_timeout_seconds=3" in serving.text()


def test_equal_weights_in_two_folders_are_refused(setup: Setup) -> None:
    (setup.model("teacher") / "weights").write_text("student")
    with setup.serve() as serving:
        assert serving.wait() == 1
    assert "give equal scores for the probe" in serving.text()


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("unsteady", "scores the probe differently in a second call"),
        ("shifted", "scores the probe differently from token 16 on"),
        ("heeds_temperature", "heeds a temperature of 0.5 where it scores"),
    ],
)
def test_an_engine_that_scores_in_another_way(setup: Setup, fault: str, problem: str) -> None:
    (setup.model("teacher") / fault).touch()
    with setup.serve() as serving:
        assert serving.wait() == 1
    assert "teacher: http://127.0.0.1:" in serving.text()
    assert problem in serving.text()


def test_one_model_for_both(setup: Setup) -> None:
    """Distilling a model into itself is allowed when it is meant."""
    with setup.serve(
        "true", overrides=(f"serving.teacher.model_path={setup.model('student')}",)
    ) as s:
        assert s.wait() == 0, s.text()


def test_engines_of_somebody_else(setup: Setup) -> None:
    """Given addresses: no engine is started, but the routes are probed all the same."""
    with setup.serve() as owner:
        engines = owner.wait_until_served().model("student").engines
        before = owner.family()
        overrides = (
            f"serving.directory={setup.folder / 'guest'}",
            f"serving.student.addresses=[{engines[0]}/]",
            f"serving.teacher.addresses=[{', '.join(engines)}]",
            f"serving.teacher.model_path={setup.model('student')}",
        )
        guest_file = endpoints_path(setup.folder / "guest")
        copy = setup.folder / "copy.json"
        with setup.serve("cp", str(guest_file), str(copy), overrides=overrides) as guest:
            assert guest.wait() == 0, guest.text()
        models = json.loads(copy.read_text())["models"]
        assert models["student"]["route"] == engines[0]
        assert models["teacher"]["route"] not in engines
        assert owner.family() == before
        wrong = (
            *overrides[:3],
            f"serving.teacher.addresses=[{owner_teacher(owner)}, {engines[0]}]",
        )
        with setup.serve("true", overrides=wrong) as guest:
            assert guest.wait() == 1
        assert "it leads to another model or to other weights" in guest.text()


def owner_teacher(owner: Serving) -> str:
    return read_endpoints(owner.directory).model("teacher").engines[0]


def test_a_second_fleet_is_refused(setup: Setup) -> None:
    with setup.serve() as first:
        first.wait_until_served()
        with setup.serve() as second:
            assert second.wait() == 2
        assert "already serves" in second.text()
        assert read_endpoints(setup.directory).pid == first.process.pid


def test_addresses_left_by_a_machine_that_was_lost(setup: Setup) -> None:
    """They lie in a shared folder; the next start on another node must not refuse for ever."""
    with setup.serve() as first:
        left = dataclasses.replace(first.wait_until_served(), hostname="elsewhere")
    unreachable = dataclasses.replace(left, front_door="http://nowhere.invalid:9")
    write_endpoints(unreachable, setup.directory)
    with setup.serve("true") as second:
        assert second.wait() == 0, second.text()
    write_endpoints(left, setup.directory)  # served on its loopback: that cannot be known from here
    with setup.serve("true") as third:
        assert third.wait() == 2
    assert "on elsewhere already serves" in third.text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("serving.host=nowhere.invalid",), "serving.host is 'nowhere.invalid'"),
        (("serving.python=/nowhere/python",), "serving.python is '/nowhere/python'"),
        (("serving.teacher.model_path=/nowhere",), "serving.teacher.model_path is '/nowhere'"),
        (("serving=null",), "serving is missing"),
    ],
)
def test_bad_settings(setup: Setup, overrides: tuple[str, ...], message: str) -> None:
    with setup.serve(overrides=overrides) as serving:
        assert serving.wait() in (1, 2)
    assert message in serving.text()
    assert "Traceback" not in serving.text()


def test_a_command_that_does_not_exist(setup: Setup) -> None:
    with setup.serve("no-such-program") as serving:
        assert serving.wait() == 1
    assert "the command cannot be started" in serving.text()


def test_addresses_of_another_process_with_the_same_pid(tmp_path: Path) -> None:
    endpoints = Endpoints("http://x", {}, os.getpid(), 1, socket.gethostname())
    write_endpoints(endpoints, tmp_path)
    with pytest.raises(FleetError, match="are gone"):
        read_endpoints(tmp_path)
    write_endpoints(dataclasses.replace(endpoints, hostname="elsewhere"), tmp_path)
    assert read_endpoints(tmp_path).pid == os.getpid()


def test_an_address_where_nothing_answers_is_named(setup: Setup) -> None:
    nobody = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    overrides = (f"serving.student.addresses=[{nobody}]", "serving.start_timeout_seconds=15")
    with setup.serve("true", overrides=overrides) as serving:
        assert serving.wait() == 1
    assert f"start_timeout_seconds=15; nothing answered {nobody} (/health) with 200;" in (
        serving.text()
    )
