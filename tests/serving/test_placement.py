"""Engines that were started by another configuration are found out before a run begins."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import TypeAdapter

from sod_mcore.config import ConfigError, SodConfig
from sod_mcore.serving.endpoints import Endpoints, ModelEndpoints
from sod_mcore.serving.fleet.state import FleetStateFile
from sod_mcore.serving.placement import check_engines_can_sleep
from tests.serving.scripted_engines import ScriptedEngines, running_engines

SAVER = {"device": "cuda", "enable_memory_saver": True}
KEEPER = {**SAVER, "enable_weights_cpu_backup": True}


class Started(ScriptedEngines):
    """A student and a teacher that tell how they were started."""

    infos: tuple[dict[str, Any], dict[str, Any]]

    def application(self, index: int) -> web.Application:
        async def server_info(request: web.Request) -> web.Response:
            return web.json_response(self.infos[index])

        application = web.Application()
        application.router.add_get("/server_info", server_info)
        return application


@pytest.mark.parametrize(
    ("student", "teacher", "blamed"),
    [
        (SAVER, KEEPER, None),
        ({"device": "cpu"}, {"device": "cpu"}, None),
        ({"device": "cuda", "enable_memory_saver": False}, KEEPER, "student"),
        (SAVER, SAVER, "teacher"),
    ],
)
@pytest.mark.parametrize("placement", ["split", "colocated"])
def test_engines_without_the_flags(
    tmp_path: Path,
    placement: str,
    student: dict[str, Any],
    teacher: dict[str, Any],
    blamed: str | None,
) -> None:
    """Their answer to a release would be 200, and the trainer would run out of memory."""
    engines = Started()
    engines.infos = (student, teacher)
    with running_engines(engines):
        config, endpoints = fleet(tmp_path, engines.urls, placement)
        record(tmp_path, engines.urls)
        if blamed is None or placement == "split":
            check_engines_can_sleep(config, endpoints, 10.0)
            return
        with pytest.raises(ConfigError, match=f"of {blamed} was started by another config"):
            check_engines_can_sleep(config, endpoints, 10.0)


def test_an_engine_of_another_fleet(tmp_path: Path) -> None:
    engines = Started()
    engines.infos = (SAVER, KEEPER)
    with running_engines(engines):
        config, endpoints = fleet(tmp_path, engines.urls, "colocated")
        record(tmp_path, (engines.urls[0], "http://127.0.0.1:9"))
        with pytest.raises(ConfigError, match=f"{engines.urls[1]} of teacher was started by"):
            check_engines_can_sleep(config, endpoints, 10.0)


def test_a_fleet_on_another_machine(tmp_path: Path) -> None:
    """It would look for rank 0 among its own processes, and take it for dead."""
    engines = Started()
    engines.infos = (SAVER, KEEPER)
    with running_engines(engines):
        config, endpoints = fleet(tmp_path, engines.urls, "colocated")
        record(tmp_path, engines.urls)
        elsewhere = dataclasses.replace(endpoints, hostname="elsewhere")
        with pytest.raises(ConfigError, match="the engines run on elsewhere: rank 0 must be on"):
            check_engines_can_sleep(config, elsewhere, 10.0)


def fleet(directory: Path, urls: tuple[str, ...], placement: str) -> tuple[SodConfig, Endpoints]:
    model = {"model_path": "folder", "max_total_tokens": 1000}
    tree = {
        "run": {"directory": str(directory), "steps": 1},
        "student": {"model_path": "folder"},
        "data": {"train": "train.parquet"},
        "serving": {"student": model, "teacher": model, "placement": placement},
    }
    models = {
        name: ModelEndpoints(name, url, (url,), "folder", 64, 100)
        for name, url in zip(("student", "teacher"), urls, strict=True)
    }
    endpoints = Endpoints("http://127.0.0.1:9", models, 1, 1, socket.gethostname())
    return TypeAdapter(SodConfig).validate_python(tree), endpoints


def record(directory: Path, urls: tuple[str, ...]) -> None:
    """What the fleet has started."""
    states = FleetStateFile(directory)
    for name, url in zip(("student", "teacher"), urls, strict=True):
        states.record(f"{name}_engine_0", name, "engine", url, "ready", 0)
