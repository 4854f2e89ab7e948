"""What engines reserve on a Ray cluster, and settings that cannot work there."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from sod_mcore.config import ConfigError, EngineConfig, ServingConfig
from sod_mcore.serving.fleet.engine_actor import choose_address, without_ray
from sod_mcore.serving.fleet.launch import Address, free_port
from sod_mcore.serving.fleet.ray_room import (
    Node,
    Room,
    check_engines_on,
    check_room,
    describe,
    engine_room,
)

LOOPBACK = "127.0.0.1"


def serving(engine: dict[str, Any] | None = None, **settings: Any) -> ServingConfig:
    return ServingConfig(student=EngineConfig(model_path="m", **(engine or {})), **settings)


@pytest.mark.parametrize(
    ("settings", "engine", "problem"),
    [
        ({"ray_address": "10.0.0.1:6379"}, {}, "ray_address is 10.0.0.1:6379, but .* is local"),
        ({}, {"ray_gpus": 2}, "student.ray_gpus is 2, but serving.engines_on is local"),
        ({}, {"ray_cpus": 0.5}, "student.ray_cpus is 0.5, but serving.engines_on is local"),
        ({"engines_on": "ray"}, {"gpus": (0, 1)}, r"student.gpus is \[0, 1\], .*student.ray_gpus"),
        ({"engines_on": "ray", "ray_address": "ray://h:1"}, {}, "not the cluster's own address"),
        ({"engines_on": "ray", "ray_address": "here"}, {}, "give host:port, or auto"),
        ({"engines_on": "ray", "ray_address": "127.0.0.1:9"}, {}, "nothing answers .*; start the"),
    ],
)
def test_wrong_settings_are_one_line_with_the_mend(
    settings: dict[str, Any], engine: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^serving\.[^\n]*{problem}[^\n]*$"):
        check_engines_on(serving(engine, **settings))


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engines_on(serving(engines_on="ray"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"engines_on is ray, .* pip install 'sod_mcore\[ray\]'"):
        check_engines_on(serving(engines_on="ray"))
    check_engines_on(serving())


@pytest.mark.parametrize(
    ("device", "engine", "room"),
    [
        ("cuda", {}, Room(1, 1.0)),
        ("cuda", {"ray_gpus": 4, "ray_cpus": 2.5}, Room(4, 2.5)),
        ("cpu", {"threads": 3}, Room(0, 3.0)),
        ("cpu", {"threads": 3, "ray_cpus": 0.5}, Room(0, 0.5)),
    ],
)
def test_what_an_engine_reserves(device: Any, engine: dict[str, Any], room: Room) -> None:
    config = EngineConfig(model_path="m", **engine)
    assert engine_room("serving.student", config, device) == room


def test_room_in_the_words_of_ray() -> None:
    assert Room(2, 0.5).resources == {"GPU": 2.0, "CPU": 0.5}
    assert Room(0, 1.0).resources == {"CPU": 1.0}
    assert Room.of({"CPU": 8.0, "node:10.0.0.1": 1.0}) == Room(0.0, 8.0)


def test_gpus_for_engines_without_any_are_refused() -> None:
    config = EngineConfig(model_path="m", ray_gpus=1)
    with pytest.raises(ConfigError, match=r"^serving\.teacher\.ray_gpus is 1, but .* on CPUs"):
        engine_room("serving.teacher", config, "cpu")


def test_a_cluster_that_can_never_have_room() -> None:
    nodes = [Node("10.0.0.1", Room(2, 8)), Node("10.0.0.2", Room(2, 8))]
    check_room({"student": (2, Room(2, 1)), "teacher": (2, Room(0, 7))}, nodes)
    with pytest.raises(
        ConfigError,
        match=r"each engine of student reserves 4 GPUs and 1 CPU on one node \(serving\.student\."
        r"ray_gpus, serving\.student\.ray_cpus\), .*10\.0\.0\.1: 2 GPUs and 8 CPUs, 10\.0\.0\.2",
    ):
        check_room({"student": (1, Room(4, 1))}, nodes)
    with pytest.raises(ConfigError, match=r"serving\.teachers\.mathematics\.ray_gpus"):
        check_room({"mathematics": (1, Room(4, 1))}, nodes)
    asked = {"student": (3, Room(1, 1)), "teacher": (1, Room(2, 1))}
    assert describe(asked) == (
        "5 GPUs and 4 CPUs (student: 3 x 1 GPU and 1 CPU; teacher: 1 x 2 GPUs and 1 CPU)"
    )
    with pytest.raises(ConfigError, match=r"reserve 5 GPUs .* the Ray cluster has 4 GPUs and 16"):
        check_room(asked, nodes)


def test_an_address_is_kept_where_it_can_be() -> None:
    last = Address(LOOPBACK, free_port(LOOPBACK))
    assert choose_address(LOOPBACK, last, frozenset({last})) == last
    other = choose_address("127.0.0.2", last, frozenset())
    assert other.host == "127.0.0.2"


def test_an_address_of_another_engine_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who still has it would ask an engine of another model."""
    ports = iter([1, 2, 3])
    monkeypatch.setattr("sod_mcore.serving.fleet.launch.free_port", lambda host: next(ports))
    monkeypatch.setattr("sod_mcore.serving.fleet.launch.is_free_port", lambda host, port: False)
    taken = frozenset({Address(LOOPBACK, 1), Address(LOOPBACK, 2), Address("127.0.0.2", 3)})
    assert choose_address(LOOPBACK, Address(LOOPBACK, 1), taken) == Address(LOOPBACK, 3)


def test_an_engine_hears_nothing_of_ray() -> None:
    environment = {"RAY_AUTH_TOKEN": "secret", "CUDA_VISIBLE_DEVICES": "1", "ARRAY_": "x"}
    assert without_ray(environment) == {"CUDA_VISIBLE_DEVICES": "1", "ARRAY_": "x"}
