"""Engines on three nodes of a real Ray, with programs in place of SGLang's."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
import pytest

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.scoring import score
from sod_mcore.serving.endpoints import Endpoints, FleetError, engines_now, read_endpoints
from sod_mcore.serving.fleet.engine_actor import EngineOrder
from sod_mcore.serving.fleet.places import NotStartedError
from sod_mcore.serving.fleet.ray_place import RayPlace
from sod_mcore.serving.fleet.ray_room import Room
from sod_mcore.serving.fleet.state import read_fleet_state
from tests.serving.fleet.test_lifecycle import Serving, Setup, setup
from tests.serving.fleet.test_restarts import group_of, score_through, wait_for_state
from tests.serving.processes import wait_until_gone
from tests.serving.ray_nodes import (
    HEAD,
    WORKERS,
    actor_of,
    add_node,
    engine_at,
    environment_of,
    kill_node,
    left_of,
    nodes_on_loopback,
    watchdogs_of_actors,
)

__all__ = ["setup"]

PATIENCE = 120.0
"""Seconds for what takes a few on an idle machine."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with nodes_on_loopback() as started:
        yield started


@pytest.fixture
def on_ray(cluster: Any, setup: Setup) -> Setup:
    """The fleet of the other tests on Ray: two engines of the student, one of the teacher."""
    setup.settings["serving"] |= {
        "engines_on": "ray",
        "ray_address": cluster.address,
        "device": "auto",
        "start_timeout_seconds": PATIENCE,
    }
    return setup


def hosts(endpoints: Endpoints, model: str) -> list[str]:
    return [urlsplit(url).hostname or "" for url in endpoints.model(model).engines]


def stop(serving: Serving) -> None:
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(PATIENCE) == 0, serving.text()


def assert_nothing_is_left(folder: Path) -> None:
    """Watchdogs end by themselves, when the actor has said farewell."""
    assert not wait_until_gone(left_of(folder), 10)


def test_engines_are_spread_and_have_the_gpus_that_ray_gives_them(on_ray: Setup) -> None:
    overrides = ("serving.student.ray_gpus=2", "serving.teacher=null")
    with on_ray.serve(overrides=overrides) as serving:
        endpoints = serving.wait_until_served()
        assert set(hosts(endpoints, "student")) == set(WORKERS)
        for url in endpoints.model("student").engines:
            leader = engine_at(url)
            environment, words = environment_of(leader), psutil.Process(leader).cmdline()
            assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
            assert words[words.index("--tp-size") + 1] == "2"
            assert words[words.index("--device") + 1] == "cuda"
            assert not [name for name in environment if name.startswith("RAY_")]
            assert os.getpgid(leader) == leader
        assert urlsplit(endpoints.front_door).hostname == HEAD
        route = endpoints.model("student").route
        assert urlsplit(route).hostname == HEAD
        assert score_through(endpoints, "student", route) == score_through(
            endpoints, "student", endpoints.front_door
        )
        logs = {path.name for path in (on_ray.directory / "serving").glob("student_engine_*.log")}
        assert logs == {"student_engine_0.log", "student_engine_1.log"}
        states = read_fleet_state(on_ray.directory).incarnations("student")
        assert states == dict.fromkeys(endpoints.model("student").engines, 1)
        family = left_of(on_ray.folder)
        assert len(family) > 2 * 2 + 2, "engines with their children, watchdogs, router, fleet"
        stop(serving)
        assert not wait_until_gone(family - watchdogs_of_actors(), 0)
    assert_nothing_is_left(on_ray.folder)


def test_two_engines_of_a_node_have_different_gpus(on_ray: Setup) -> None:
    overrides = ("serving.student.engines=4", "serving.teacher=null")
    with on_ray.serve(overrides=overrides) as serving:
        endpoints = serving.wait_until_served()
        found = sorted(
            (host, environment_of(engine_at(url))["CUDA_VISIBLE_DEVICES"])
            for host, url in zip(
                hosts(endpoints, "student"), endpoints.model("student").engines, strict=True
            )
        )
    assert found == [(host, gpu) for host in WORKERS for gpu in "01"]


def test_an_engine_that_dies_is_started_again_where_it_was(on_ray: Setup) -> None:
    with on_ray.serve() as serving:
        endpoints = serving.wait_until_served()
        url = endpoints.model("student").engines[1]
        leader = engine_at(url)
        group, actor = group_of(leader), actor_of(leader)
        assert len(group) > 1, "the fake scheduler"
        os.kill(leader, signal.SIGKILL)
        wait_for_state(serving, "student_engine_1", "ready", 1)
        assert not wait_until_gone(group, 0)
        assert read_endpoints(on_ray.directory) == endpoints
        assert actor_of(engine_at(url)) == actor
        score_through(endpoints, "student", url)
        assert "student_engine_1 ended with exit code -9; it is started again" in serving.text()
        stop(serving)
    assert_nothing_is_left(on_ray.folder)


def test_an_engine_ends_with_its_actor_and_comes_back_with_another(on_ray: Setup) -> None:
    with on_ray.serve() as serving:
        endpoints = serving.wait_until_served()
        url = endpoints.model("teacher").engines[0]
        leader = engine_at(url)
        group, actor = group_of(leader), actor_of(leader)
        os.kill(actor, signal.SIGKILL)
        assert not wait_until_gone(group, 10), "though the leader's children are not Ray's"
        wait_for_state(serving, "teacher_engine_0", "ready", 1)
        now = read_endpoints(on_ray.directory)
        assert hosts(now, "teacher") == hosts(endpoints, "teacher"), "the room is there"
        score_through(now, "teacher", now.model("teacher").engines[0])
        assert actor_of(engine_at(now.model("teacher").engines[0])) != actor
        assert "teacher_engine_0 is lost with its Ray actor" in serving.text()


def test_an_engine_of_a_node_that_dies_moves_to_another(cluster: Any, on_ray: Setup) -> None:
    """Who has the old addresses finds the new one: a client, the router, the front door."""
    with on_ray.serve(overrides=("serving.teacher=null",)) as serving:
        endpoints = serving.wait_until_served()
        lost, kept = endpoints.model("student").engines
        route = endpoints.model("student").route
        victim, survivor = hosts(endpoints, "student")
        expected = score_through(endpoints, "student", kept)
        group = group_of(engine_at(lost))

        async def score_on_the_lost_one() -> list[float]:
            async with EngineClient(
                endpoints.reached_at("student", lost),
                restart_timeout_seconds=PATIENCE,
                find_engines=lambda model: engines_now(on_ray.directory, model)[:1],
            ) as client:
                client.require_version("student", 0)
                await score(client, "student", [1, 2, 3], 1)
                kill_node(cluster, victim)
                assert not await asyncio.to_thread(wait_until_gone, group, 30)
                return (await score(client, "student", [1, 2, 3], 1)).logprobs[1:].tolist()

        try:
            assert asyncio.run(score_on_the_lost_one()) == expected
            wait_for_state(serving, "student_engine_0", "ready", 1)
            now = read_endpoints(on_ray.directory)
            assert hosts(now, "student") == [survivor, survivor]
            assert now.model("student").engines[1] == kept
            assert now == dataclasses.replace(endpoints, models=now.models)
            assert now.model("student").route == route
            incarnations = read_fleet_state(on_ray.directory).incarnations("student")
            assert incarnations == {now.model("student").engines[0]: 2, kept: 1}
            wait_for_state(serving, "student_router", "ready", 1)
            for _ in range(2):  # the fake router takes its engines in turn
                assert score_through(now, "student", route) == expected
            assert score_through(now, "student", now.front_door) == expected
            assert f"student_engine_0: ready again at http://{survivor}:" in serving.text()
            stop(serving)
        finally:
            add_node(cluster, victim)
    assert_nothing_is_left(on_ray.folder)


def test_nothing_survives_a_kill(on_ray: Setup) -> None:
    with on_ray.serve() as serving:
        endpoints = serving.wait_until_served()
        family = left_of(on_ray.folder)
        actor = actor_of(engine_at(endpoints.model("teacher").engines[0]))
        serving.process.kill()
        serving.wait()
    assert not wait_until_gone(family, 60)
    assert not psutil.pid_exists(actor)
    assert_nothing_is_left(on_ray.folder)
    with pytest.raises(FleetError, match="are gone"):
        read_endpoints(on_ray.directory)


def test_a_stop_during_the_start(on_ray: Setup) -> None:
    (on_ray.model("teacher") / "never_ready").touch()
    with on_ray.serve() as serving:
        serving.wait_for(on_ray.directory / "serving" / "teacher_engine_0.log")
        serving.process.send_signal(signal.SIGTERM)
        assert serving.wait() == 128 + signal.SIGTERM
    assert_nothing_is_left(on_ray.folder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("serving.teacher.ray_gpus=3",),
            "each engine of teacher reserves 3 GPUs and 1 CPU on one node",
        ),
        (
            ("serving.student.engines=5",),
            "the engines reserve 6 GPUs and 6 CPUs (student: 5 x 1 GPU and 1 CPU; "
            "teacher: 1 x 1 GPU and 1 CPU), and the Ray cluster has 4 GPUs and 5 CPUs",
        ),
        (
            ("serving.device=cpu", "serving.student.ray_gpus=1"),
            "serving.student.ray_gpus is 1, but the engines run on CPUs",
        ),
    ],
)
def test_what_the_cluster_cannot_hold_is_refused_at_once(
    on_ray: Setup, overrides: tuple[str, ...], message: str
) -> None:
    with on_ray.serve(overrides=overrides) as serving:
        assert serving.process.wait(PATIENCE) == 2
    assert message in serving.text()
    assert not list((on_ray.directory / "serving").glob("*.log"))


def test_room_that_others_have_taken_is_one_error_before_the_start_timeout(
    on_ray: Setup,
) -> None:
    first = on_ray.settings["serving"]
    with on_ray.serve() as serving:
        serving.wait_until_served()
        other = Setup(on_ray.folder / "other", on_ray.settings | {"serving": {**first}})
        other.folder.mkdir()
        other.settings["run"] = {"directory": str(other.directory)}
        began = time.monotonic()
        with other.serve(overrides=("serving.start_timeout_seconds=3600",)) as second:
            assert second.process.wait(PATIENCE) == 1
        assert time.monotonic() - began < PATIENCE
    text = second.text()
    assert "error: the engines reserve 3 GPUs and 3 CPUs" in text
    assert "could not give them that within 30 s" in text
    assert "1 GPU and 2 CPUs of it are free" in text


def test_an_interpreter_that_a_node_lacks(on_ray: Setup) -> None:
    with on_ray.serve(overrides=(f"serving.python={on_ray.folder / 'nowhere'}",)) as serving:
        assert serving.process.wait(PATIENCE) == 1
    assert "on Ray node 127.0.0." in serving.text()
    assert "nowhere', which cannot be started: [Errno 2]" in serving.text()


def test_a_relative_path_holds_on_every_node(on_ray: Setup, tmp_path: Path) -> None:
    """Ray's processes have another working folder than the fleet."""
    relative = Path(os.path.relpath(on_ray.model("student"), Path(__file__).parents[3]))
    overrides = (f"serving.student.model_path={relative}", "serving.teacher=null")
    with on_ray.serve(overrides=overrides) as serving:
        endpoints = serving.wait_until_served()
        words = psutil.Process(engine_at(endpoints.model("student").engines[0])).cmdline()
        assert Path(words[words.index("--model-path") + 1]).is_absolute()


def test_a_process_joins_one_cluster_and_may_do_so_twice(cluster: Any) -> None:
    """As an evaluation does, whose fleet and rollouts are one process."""
    program = f"""
import ray
from sod_mcore.config import ConfigError
from sod_mcore.ray_cluster.connection import joined_ray
with joined_ray("serving.ray_address", {cluster.address!r}) as first:
    with joined_ray("rollout.ray_address", {cluster.address!r}) as second:
        second.check()
    first.check()
    assert ray.cluster_resources()["GPU"] == 4.0
    try:
        with joined_ray("rollout.ray_address", "127.0.0.1:1"):
            raise AssertionError("it is no cluster")
    except ConfigError as error:
        print(error)
assert not ray.is_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rollout.ray_address is 127.0.0.1:1: this process uses the Ray cluster at " in (
        done.stdout
    )


def test_the_command_hears_nothing_of_ray(on_ray: Setup) -> None:
    """It may join a cluster of its own choice."""
    overrides = ("serving.teacher=null", "serving.student.engines=1")
    copy = on_ray.folder / "environment"
    before = {name for name in os.environ if name.startswith("RAY_")}
    with on_ray.serve("sh", "-c", f"env > {copy}", overrides=overrides) as serving:
        assert serving.process.wait(PATIENCE) == 0, serving.text()
    names = {line.partition("=")[0] for line in copy.read_text().splitlines()}
    assert {name for name in names if name.startswith("RAY_")} == before


def test_no_node_with_room_is_told_in_words(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the death of the last node that had it; the actor stays in the queue for it."""
    made: list[Any] = []

    class QueuedActor:
        def __init__(self) -> None:
            made.append(self)
            self.host = self

        def remote(self) -> Awaitable[str]:
            return asyncio.get_running_loop().create_future()

    def refuse_order(last: object) -> EngineOrder:
        raise AssertionError("nothing can be started")

    place = RayPlace(Room(2, 1), None, refuse_order, set(), room_seconds=0.1)
    monkeypatch.setattr(place, "_make_actor", QueuedActor)

    async def start() -> None:
        for _ in range(2):
            with pytest.raises(
                NotStartedError, match=r"no place within 0\.1 s: it reserves 2 GPUs"
            ):
                await place.start(anew=False)

    asyncio.run(start())
    assert len(made) == 1
