"""The order of a weight update, and what an engine that refuses causes, with scripted engines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from safetensors.numpy import save_file

from sod_mcore.serving.disk_transfer import DiskTransfer
from sod_mcore.serving.fleet import Endpoints, ModelEndpoints
from sod_mcore.serving.weight_transfer import WeightUpdateError
from sod_mcore.serving.weights import update_weights, weight_versions


class ScriptedEngines:
    """Two engines that write down the calls in the order in which they end."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []
        self.versions = ["default", "default"]
        self.refusing: int | None = None
        self.forgetful: int | None = None
        self.mode = ""
        self.urls: tuple[str, ...] = ()

    def application(self, index: int) -> web.Application:
        async def pause(request: web.Request) -> web.Response:
            self.mode = (await request.json())["mode"]
            return self._note(index, "pause")

        async def update(request: web.Request) -> web.Response:
            body = await request.json()
            assert body["flush_cache"], "the cache holds what the old weights computed"
            if self.refusing == index:
                return web.json_response({"success": False, "message": "shapes"}, status=400)
            if self.forgetful != index:
                self.versions[index] = body["weight_version"]
            return self._note(index, "update")

        async def proceed(request: web.Request) -> web.Response:
            return self._note(index, "continue")

        async def info(request: web.Request) -> web.Response:
            return web.json_response({"weight_version": self.versions[index]})

        application = web.Application()
        application.router.add_post("/pause_generation", pause)
        application.router.add_post("/update_weights_from_disk", update)
        application.router.add_post("/continue_generation", proceed)
        application.router.add_get("/model_info", info)
        return application

    def _note(self, index: int, call: str) -> web.Response:
        self.calls.append((index, call))
        return web.json_response({"success": True})

    @property
    def endpoints(self) -> Endpoints:
        model = ModelEndpoints("student", "http://127.0.0.1:9", self.urls, "folder", 64, 100)
        return Endpoints("http://127.0.0.1:9", {"student": model}, 1, 1, "elsewhere")


@contextmanager
def running_engines() -> Iterator[ScriptedEngines]:
    """The engines on a thread of their own; the update is synchronous."""
    engines, loop = ScriptedEngines(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runners = [web.AppRunner(engines.application(index)) for index in range(2)]

    async def start() -> None:
        for runner in runners:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports = [runner.addresses[0][1] for runner in runners]
        engines.urls = tuple(f"http://127.0.0.1:{port}" for port in ports)

    async def stop() -> None:
        for runner in runners:
            await runner.cleanup()

    try:
        asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=10)
        yield engines
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def test_all_stand_still_before_any_is_changed(folder: Path) -> None:
    with running_engines() as engines:
        assert weight_versions(engines.endpoints, "student", 10) == (0, 0)
        update_weights(engines.endpoints, "student", DiskTransfer(folder), 5, 10)
        assert weight_versions(engines.endpoints, "student", 10) == (5, 5)
    calls = [call for _, call in engines.calls]
    assert calls == ["pause"] * 2 + ["update"] * 2 + ["continue"] * 2
    assert {index for index, _ in engines.calls[:2]} == {0, 1}
    assert engines.mode == "retract"


def test_running_requests_can_be_ended(folder: Path) -> None:
    with running_engines() as engines:
        update_weights(
            engines.endpoints, "student", DiskTransfer(folder), 5, 10, running_requests="abort"
        )
    assert engines.mode == "abort"


def test_an_engine_that_refuses_leaves_all_paused(folder: Path) -> None:
    with running_engines() as engines:
        engines.refusing = 1
        with pytest.raises(WeightUpdateError, match=r"version 5 not loaded: .* 400: .*shapes"):
            update_weights(engines.endpoints, "student", DiskTransfer(folder), 5, 10)
        assert "continue" not in [call for _, call in engines.calls]
        engines.refusing = None
        update_weights(engines.endpoints, "student", DiskTransfer(folder), 5, 10)
        assert [call for _, call in engines.calls][-2:] == ["continue"] * 2


def test_an_engine_that_reports_another_version(folder: Path) -> None:
    with running_engines() as engines:
        engines.forgetful = 1
        with pytest.raises(WeightUpdateError, match="took weight version 5 but reports version 0"):
            update_weights(engines.endpoints, "student", DiskTransfer(folder), 5, 10)
        assert "continue" not in [call for _, call in engines.calls]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_not_sent(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with running_engines() as engines, pytest.raises(WeightUpdateError, match="lacks config"):
        update_weights(engines.endpoints, "student", DiskTransfer(folder), 5, 10)
    assert not engines.calls


def test_a_negative_version(folder: Path) -> None:
    with running_engines() as engines, pytest.raises(ValueError, match="version is -1"):
        update_weights(engines.endpoints, "student", DiskTransfer(folder), -1, 10)
