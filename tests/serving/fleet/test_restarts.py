"""A fleet that starts again what dies, with real processes in place of SGLang's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.scoring import Scores, score
from sod_mcore.serving.endpoints import Endpoints, FleetError, endpoints_path
from sod_mcore.serving.fleet.restarts import RestartBudget
from sod_mcore.serving.fleet.state import (
    FleetStateFile,
    ServerState,
    read_fleet_state,
    state_path,
)
from tests.serving.fleet.test_lifecycle import SECONDS, Serving, Setup, setup
from tests.serving.processes import (
    Process,
    descendants,
    leader_at,
    process_start_ticks,
    wait_until_gone,
)

__all__ = ["setup"]


def state_of(serving: Serving, name: str) -> ServerState:
    servers = read_fleet_state(serving.directory).servers
    return {server.name: server for server in servers}[name]


def wait_for_state(serving: Serving, name: str, state: str, restarts: int) -> None:
    def is_there() -> bool:
        server = state_of(serving, name)
        return (server.state, server.restarts) == (state, restarts)

    serving.wait_until(is_there)


def group_of(pid: int) -> set[Process]:
    start = process_start_ticks(pid)
    assert start is not None
    return {(pid, start), *descendants(pid)}


def score_through(endpoints: Endpoints, model: str, url: str) -> list[float]:
    async def ask() -> list[float]:
        async with EngineClient(endpoints.reached_at(model, url)) as client:
            return (await score(client, model, [1, 2, 3], 1)).logprobs[1:].tolist()

    return asyncio.run(ask())


def test_a_killed_engine_is_started_again(setup: Setup) -> None:
    """On its port, after its whole group has gone, while the command and its requests go on."""
    with setup.serve("sleep", "600") as serving:
        endpoints = serving.wait_until_served()
        student = endpoints.model("student")
        assert dict(read_fleet_state(serving.directory).incarnations("student")) == dict.fromkeys(
            student.engines, 1
        )
        before = score_through(endpoints, "student", student.engines[1])
        leader = leader_at(serving.process.pid, student.engines[1])
        group = group_of(leader)
        assert len(group) > 1, "the fake scheduler"

        async def score_while_it_dies() -> Sequence[Scores]:
            async with EngineClient(endpoints) as client:
                os.kill(leader, signal.SIGKILL)
                requests = (score(client, "student", [n, 2, 3], 1) for n in range(40))
                return await asyncio.gather(*requests)

        assert len(asyncio.run(score_while_it_dies())) == 40
        wait_for_state(serving, "student_engine_1", "ready", 1)
        assert not wait_until_gone(group, 0)
        assert serving.wait_until_served() == endpoints
        assert score_through(endpoints, "student", student.engines[1]) == before
        assert score_through(endpoints, "student", student.route) == before
        incarnations = read_fleet_state(serving.directory).incarnations("student")
        assert incarnations == {student.engines[0]: 1, student.engines[1]: 2}
        text = serving.text()
        assert "student_engine_1 ended with exit code -9; it is started again in 1 s" in text
        assert text.count("student_engine_1: ready again after") == 1
        serving.process.send_signal(signal.SIGTERM)
        serving.wait()
    assert not state_path(setup.directory).exists()


def test_requests_to_the_only_engine_wait_for_its_restart(setup: Setup) -> None:
    with setup.serve() as serving:
        endpoints = serving.wait_until_served()
        leader = leader_at(serving.process.pid, endpoints.model("teacher").engines[0])

        async def run() -> float:
            async with EngineClient(endpoints, restart_timeout_seconds=SECONDS) as client:
                client.require_version("teacher", 0)
                await score(client, "teacher", [1, 2, 3], 1)
                os.kill(leader, signal.SIGKILL)
                await asyncio.gather(*(score(client, "teacher", [n, 2], 1) for n in range(20)))
                return client.counters("teacher").seconds_waited

        assert asyncio.run(run()) > 1.0, "the pause before the restart"
        assert state_of(serving, "teacher_engine_0").restarts == 1


def test_an_engine_that_stands_still_is_killed_and_started_again(setup: Setup) -> None:
    with setup.serve(overrides=("serving.health_timeout_seconds=10",)) as serving:
        endpoints = serving.wait_until_served()
        url = endpoints.model("teacher").engines[0]
        leader = leader_at(serving.process.pid, url)
        group = group_of(leader)
        os.kill(leader, signal.SIGSTOP)
        wait_for_state(serving, "teacher_engine_0", "ready", 1)
        assert not wait_until_gone(group, 0)
        score_through(endpoints, "teacher", url)
        assert "teacher_engine_0 did not answer for 10 s" in serving.text()
        others = [s for s in read_fleet_state(serving.directory).servers if s.model != "teacher"]
        assert [server.restarts for server in others] == [0] * 3


def test_a_supervisor_that_stood_still_blames_nobody(setup: Setup) -> None:
    """Then its own questions went unanswered: its clock has gone on, and it has not."""
    with setup.serve(overrides=("serving.health_timeout_seconds=8",)) as serving:
        endpoints = serving.wait_until_served()
        serving.process.send_signal(signal.SIGSTOP)
        asyncio.run(asyncio.sleep(10.0))
        serving.process.send_signal(signal.SIGCONT)
        asyncio.run(asyncio.sleep(3.0))
        score_through(endpoints, "teacher", endpoints.model("teacher").route)
        assert {s.restarts for s in read_fleet_state(serving.directory).servers} == {0}


def test_a_port_that_is_taken_when_the_engine_comes_back(setup: Setup) -> None:
    """The addresses must stay true, so it waits. The fleet stands still while the port changes
    hands: that does not depend on who is faster."""
    with setup.serve() as serving:
        endpoints = serving.wait_until_served()
        url = endpoints.model("teacher").engines[0]
        leader = leader_at(serving.process.pid, url)
        group = group_of(leader)
        serving.process.send_signal(signal.SIGSTOP)
        for pid, _ in group:
            os.kill(pid, signal.SIGKILL)
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            serving.wait_until(lambda: _takes(thief, url))
            thief.listen()
            serving.process.send_signal(signal.SIGCONT)
            serving.wait_until(lambda: "another program has port" in serving.text())
            assert state_of(serving, "teacher_engine_0").state == "restarting"
            assert read_fleet_state(serving.directory).incarnations("teacher") == {}
        wait_for_state(serving, "teacher_engine_0", "ready", 1)
        score_through(endpoints, "teacher", url)


def _takes(thief: socket.socket, url: str) -> bool:
    address = urlsplit(url)
    try:
        thief.bind((address.hostname, address.port))
    except OSError:
        return False
    return True


def test_an_engine_that_dies_again_and_again(setup: Setup) -> None:
    with setup.serve("sleep", "600", overrides=("serving.max_restarts=2",)) as serving:
        endpoints = serving.wait_until_served()
        leader = leader_at(serving.process.pid, endpoints.model("student").engines[0])
        family = serving.family()
        (setup.model("student") / "die_at_start").touch()
        os.kill(leader, signal.SIGKILL)
        assert serving.wait() == 1
    text = serving.text()
    assert "student_engine_0 ended with exit code -9; it is started again in 1 s" in text
    assert "student_engine_0 ended with exit code 1; it is started again in 2 s" in text
    given_up = "error: student_engine_0 ended with exit code 1 after 2 restarts in 3600 s"
    assert given_up in text
    assert "not enough memory for this model" in text.partition(given_up)[2]
    assert not wait_until_gone(family, 0)
    assert not endpoints_path(setup.directory).exists()
    server = state_of(serving, "student_engine_0")
    assert (server.state, server.restarts) == ("given up", 2)


def test_a_killed_router_finds_its_engines_again(setup: Setup) -> None:
    with setup.serve() as serving:
        endpoints = serving.wait_until_served()
        student = endpoints.model("student")
        before = score_through(endpoints, "student", student.route)
        os.kill(leader_at(serving.process.pid, student.route), signal.SIGKILL)
        wait_for_state(serving, "student_router", "ready", 1)
        for _ in student.engines:  # the fake router takes them in turn
            assert score_through(endpoints, "student", student.route) == before
        assert score_through(endpoints, "student", endpoints.front_door) == before
        assert set(read_fleet_state(serving.directory).incarnations("student").values()) == {1}


def test_engines_of_others_are_left_alone(setup: Setup) -> None:
    with setup.serve(overrides=("serving.max_restarts=0",)) as owner:
        engines = owner.wait_until_served().model("student").engines
        overrides = (
            f"serving.directory={setup.folder / 'guest'}",
            f"serving.student.addresses=[{', '.join(engines)}]",
            "serving.teacher=null",
        )
        with setup.serve(overrides=overrides) as guest:
            guest.wait_for(endpoints_path(setup.folder / "guest"))
            before = guest.family()
            os.kill(leader_at(owner.process.pid, engines[0]), signal.SIGKILL)
            assert owner.wait() == 1
            asyncio.run(asyncio.sleep(2.0))
            assert guest.family() == before
            servers = read_fleet_state(setup.folder / "guest").servers
            assert [(s.name, s.restarts) for s in servers] == [("student_router", 0)]


def test_the_budget_of_restarts() -> None:
    budget = RestartBudget(most=3, window_seconds=100.0)
    assert [budget.take(now) for now in (0.0, 10.0, 20.0, 30.0)] == [1.0, 2.0, 4.0, None]
    assert budget.take(99.9) is None
    assert budget.take(100.0) == 4.0, "the first has left the window"
    assert budget.take(1000.0) == 1.0


def test_pauses_are_bounded() -> None:
    budget = RestartBudget(most=10**6, window_seconds=1e9)
    pauses = [budget.take(0.0) for _ in range(2000)]
    assert pauses[:8] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert set(pauses[8:]) == {60.0}


def test_no_restarts() -> None:
    assert RestartBudget(most=0, window_seconds=100.0).take(0.0) is None


def test_the_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="no fleet runs from"):
        read_fleet_state(tmp_path)
    file = FleetStateFile(tmp_path)
    file.record("student_engine_1", "student", "engine", "http://b", "ready", 2)
    file.record("student_engine_0", "student", "engine", "http://a", "restarting", 1)
    file.record("student_router", "student", "router", "http://r", "ready", 5)
    file.record("teacher_engine_0", "teacher", "engine", "http://t", "ready", 0)
    state = read_fleet_state(tmp_path)
    assert [server.name for server in state.servers][:2] == ["student_engine_0", "student_engine_1"]
    assert state.incarnations("student") == {"http://b": 3}
    assert state.incarnations("teacher") == {"http://t": 1}
    assert all(server.changed_at > 1e9 for server in state.servers)
    FleetStateFile(tmp_path).remove()
    assert read_fleet_state(tmp_path) == state, "it is that of another fleet"
    file.remove()
    assert not state_path(tmp_path).exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"servers": [{"name": "x"}]}'])
def test_a_state_of_another_version(tmp_path: Path, text: str) -> None:
    state_path(tmp_path).parent.mkdir()
    state_path(tmp_path).write_text(text)
    with pytest.raises(FleetError, match="not written by this version"):
        read_fleet_state(tmp_path)


def test_the_state_is_valid_json_for_other_programs(tmp_path: Path) -> None:
    FleetStateFile(tmp_path).record("e", "student", "engine", "http://a", "starting", 0)
    (server,) = json.loads(state_path(tmp_path).read_text())["servers"]
    assert server["state"] == "starting"
    names = {"name", "model", "role", "url", "state", "restarts", "changed_at", "visible_gpus"}
    assert set(server) == names
