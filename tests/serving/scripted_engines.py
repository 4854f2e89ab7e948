"""Engines that only keep a diary of what a weight update asks of them."""

from __future__ import annotations

import asyncio
import base64
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from sod_mcore.serving.endpoints import Endpoints, ModelEndpoints
from tests.serving.scripted_group import ScriptedRanks


@dataclass(frozen=True)
class Received:
    """One request with tensors: what each tensor-parallel rank found, and the options.

    ``payloads`` are those that came over HTTP.
    """

    tensors: tuple[list[tuple[str, torch.Tensor]], ...]
    version: str | None
    flush_cache: bool
    payloads: tuple[bytes, ...] = ()


@dataclass
class ScriptedEngines:
    """Two engines that write down the calls in the order in which they end.

    Attributes:
        refusing: index of the engine that refuses weights.
        accepted_buckets: how many it takes before.
        forgetful: index of the engine that keeps its old version.
        is_busy: whether requests are in flight, whose part of the cache cannot be emptied.
        session: whether the engines know begin_weight_update and end_weight_update.
        tensor_parallel_sizes: ranks of each engine.
        absent: index of the engine that never answers when it is to join a group.
        unwilling: index of the engine that refuses to join a group.
        dying: index of the engine that ends when it has ``accepted_buckets`` and gets another one.
        stuck: index of the engine that stands still then.
        sleepless: index of the engine that refuses to release its memory.
        cacheless: index of the engine that does not get its cache back.
        notes_questions: whether questions for the version and requests are written down as well.
        released: the memory that each engine has not got.
        are_paused: which engines stand still.
        device: on which they say that they run.
        when_received: called when tensors have arrived over HTTP, before the answer.
    """

    model_path: Path = Path("folder")
    calls: list[tuple[int, str]] = field(default_factory=list)
    versions: list[str] = field(default_factory=lambda: ["default", "default"])
    received: tuple[list[Received], list[Received]] = field(default_factory=lambda: ([], []))
    refusing: int | None = None
    accepted_buckets: int = 0
    forgetful: int | None = None
    is_busy: bool = False
    has_broken_cache: bool = False
    session: bool = True
    is_open: list[bool] = field(default_factory=lambda: [False, False])
    tensor_parallel_sizes: tuple[int, int] = (1, 1)
    pipeline_stages: int = 1
    absent: int | None = None
    unwilling: int | None = None
    dying: int | None = None
    stuck: int | None = None
    sleepless: int | None = None
    cacheless: int | None = None
    notes_questions: bool = False
    released: list[set[str]] = field(default_factory=lambda: [set(), set()])
    are_paused: list[bool] = field(default_factory=lambda: [False, False])
    ranks: tuple[ScriptedRanks, ScriptedRanks] = field(
        default_factory=lambda: (ScriptedRanks(), ScriptedRanks())
    )
    groups: list[str] = field(default_factory=list)
    mode: str = ""
    urls: tuple[str, ...] = ()
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    device: str = "cpu"
    when_received: Callable[[], object] = lambda: None

    def application(self, index: int) -> web.Application:
        async def pause(request: web.Request) -> web.Response:
            self.mode = (await request.json())["mode"]
            self.are_paused[index] = True
            return self._note(index, "pause")

        async def update_from_disk(request: web.Request) -> web.Response:
            body = await request.json()
            if body["flush_cache"] and self.mode == "in_place" and self.is_busy:
                return _refusal("Weights were updated, but the cache was not flushed")
            if self.refusing == index:
                return _refusal("shapes")
            if "weights" in self.released[index]:
                return self._die(index, request)
            if self.forgetful != index:
                self.versions[index] = body["weight_version"]
            return self._note(index, "update and flush" if body["flush_cache"] else "update")

        async def release(request: web.Request) -> web.Response:
            tags = (await request.json())["tags"]
            if self.sleepless == index:
                return _refusal("no memory saver")
            if self.released[index] or not self.are_paused[index]:
                return self._die(index, request)  # as SGLang does, the first on a GPU only
            self.released[index] = set(tags)
            return self._note(index, f"release {' '.join(tags)}")

        async def resume(request: web.Request) -> web.Response:
            tags = (await request.json())["tags"]
            if self.cacheless == index and "kv_cache" in tags:
                return _refusal("out of memory")
            if not self.released[index].issuperset(tags):
                return self._die(index, request)
            self.released[index].difference_update(tags)
            return self._note(index, f"resume {' '.join(tags)}")

        async def flush_cache(request: web.Request) -> web.Response:
            if self.has_broken_cache:
                return web.Response(text="Internal Server Error", status=500)
            if self.is_busy:
                return web.Response(text="Flush cache failed.\n", status=400)
            self.calls.append((index, "flush"))
            return web.Response(text="Cache flushed.\n")

        async def update_from_tensor(request: web.Request) -> web.Response:
            if self.session and not self.is_open[index]:
                return _refusal("must run between begin_weight_update() and end_weight_update()")
            body = await request.json()
            if self.refusing == index and len(self.received[index]) >= self.accepted_buckets:
                return _refusal("out of memory")
            self.received[index].append(_decoded(body))
            self.when_received()
            if body.get("weight_version") and self.forgetful != index:
                self.versions[index] = body["weight_version"]
            return self._note(index, "bucket")

        async def join_group(request: web.Request) -> web.Response:
            body = await request.json()
            if self.absent == index:
                return await self._never()
            if self.unwilling == index:
                return _refusal("no such backend")
            self.groups.append(body["group_name"])
            failure = await self.ranks[index].join(body, self.tensor_parallel_sizes[index])
            return self._note(index, "join") if failure is None else _refusal(failure)

        async def update_from_group(request: web.Request) -> web.Response:
            if self.session and not self.is_open[index]:
                return _refusal("must run between begin_weight_update() and end_weight_update()")
            body = await request.json()
            has_enough = len(self.received[index]) >= self.accepted_buckets
            if has_enough and self.dying == index:
                assert request.transport is not None
                request.transport.abort()
                self.ranks[index].die()
            if has_enough and self.stuck == index:
                return await self._never()
            tensors = await self.ranks[index].receive(body)
            if isinstance(tensors, str):
                return _refusal(tensors)
            if not body["names"] and not body.get("weight_version"):
                return self._note(index, "still there")
            version, flush_cache = body.get("weight_version"), body["flush_cache"]
            self.received[index].append(Received(tensors, version, flush_cache))
            if version and self.forgetful != index:
                self.versions[index] = version
            return self._note(index, "bucket")

        async def leave_group(request: web.Request) -> web.Response:
            if not self.ranks[index].leave((await request.json())["group_name"]):
                return _refusal("The group to be destroyed does not exist.")
            return self._note(index, "leave")

        async def follow_script(request: web.Request) -> web.Response:
            for name, value in (await request.json()).items():
                setattr(self, name, value)
            return web.json_response({})

        async def begin(request: web.Request) -> web.Response:
            if self.is_open[index]:
                return _refusal("a weight-update session is already open")
            self.is_open[index] = True
            return self._note(index, "begin")

        async def end(request: web.Request) -> web.Response:
            if not self.is_open[index]:
                return _refusal("no weight-update session is open")
            self.is_open[index] = False
            return self._note(index, "end")

        async def proceed(request: web.Request) -> web.Response:
            self.are_paused[index] = False
            return self._note(index, "continue")

        async def model_info(request: web.Request) -> web.Response:
            if self.notes_questions:
                self.calls.append((index, "version"))
            return web.json_response({"weight_version": self.versions[index]})

        async def server_info(request: web.Request) -> web.Response:
            size = self.tensor_parallel_sizes[index]
            stages = self.pipeline_stages
            return web.json_response({"tp_size": size, "pp_size": stages, "device": self.device})

        async def generate(request: web.Request) -> web.Response:
            ids = (await request.json())["input_ids"]
            if self.released[index] and not self.are_paused[index]:
                return self._die(index, request)
            if self.notes_questions:
                self.calls.append((index, "generate"))
            scores = [[None if n == 0 else -1.0, token, None] for n, token in enumerate(ids)]
            return web.json_response({"meta_info": {"input_token_logprobs": scores}})

        application = web.Application(client_max_size=1 << 30)
        application.router.add_post("/pause_generation", pause)
        application.router.add_post("/update_weights_from_disk", update_from_disk)
        application.router.add_post("/update_weights_from_tensor", update_from_tensor)
        application.router.add_post("/init_weights_update_group", join_group)
        application.router.add_post("/update_weights_from_distributed", update_from_group)
        application.router.add_post("/destroy_weights_update_group", leave_group)
        application.router.add_post("/flush_cache", flush_cache)
        application.router.add_post("/release_memory_occupation", release)
        application.router.add_post("/resume_memory_occupation", resume)
        application.router.add_post("/continue_generation", proceed)
        application.router.add_post("/generate", generate)
        application.router.add_post("/follow_script", follow_script)
        application.router.add_get("/model_info", model_info)
        application.router.add_get("/server_info", server_info)
        if self.session:
            application.router.add_post("/begin_weight_update", begin)
            application.router.add_post("/end_weight_update", end)
        return application

    def _note(self, index: int, call: str) -> web.Response:
        self.calls.append((index, call))
        return web.json_response({"success": True})

    def _die(self, index: int, request: web.Request) -> web.Response:
        """As an engine does that touches memory which is not there."""
        assert request.transport is not None
        request.transport.abort()
        return self._note(index, "die")

    async def _never(self) -> web.Response:
        await self.closing.wait()
        return _refusal("the test is over")

    def calls_of(self, index: int) -> list[str]:
        """The calls to one engine."""
        return [call for number, call in self.calls if number == index]

    def call_names(self) -> list[str]:
        """The calls without the engines' numbers."""
        return [call for _, call in self.calls]

    @property
    def endpoints(self) -> Endpoints:
        """The fleet that they are."""
        model = ModelEndpoints(
            "student", "http://127.0.0.1:9", self.urls, str(self.model_path), 64, 100
        )
        return Endpoints("http://127.0.0.1:9", {"student": model}, 1, 1, "elsewhere")


def _refusal(message: str) -> web.Response:
    return web.json_response({"success": False, "message": message}, status=400)


def _decoded(body: dict[str, object]) -> Received:
    texts = body["serialized_named_tensors"]
    assert isinstance(texts, list)
    payloads = [base64.b64decode(text, validate=True) for text in texts]
    is_flattened = body.get("load_format") == "flattened_bucket"
    found = [pickle.loads(payload) for payload in payloads]
    return Received(
        tuple(map(_reconstructed, found) if is_flattened else found),
        body.get("weight_version"),  # type: ignore[arg-type]
        bool(body["flush_cache"]),
        tuple(payloads),
    )


def _reconstructed(flattened: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """The tensors of SGLang's format "flattened_bucket"."""
    everything = flattened["flattened_tensor"]
    return [
        (
            place.name,
            everything[place.start_idx : place.end_idx].view(place.dtype).reshape(place.shape),
        )
        for place in flattened["metadata"]
    ]


@contextmanager
def running_engines(engines: ScriptedEngines | None = None) -> Iterator[ScriptedEngines]:
    """The engines on a thread of their own; the update is synchronous."""
    engines, loop = engines or ScriptedEngines(), asyncio.new_event_loop()
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
        engines.closing.set()
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
