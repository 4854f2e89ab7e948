"""Engines that answer ``/generate`` as a test wants, and remember what they were asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.messages import Generation, SamplingSettings
from sod_mcore.serving.client.replicas import Affinity
from sod_mcore.serving.endpoints import Endpoints, ModelEndpoints

SAMPLING = SamplingSettings(max_new_tokens=3)
VOCAB_SIZE = 100
PATIENCE = 60.0
"""Seconds until a test that waits for something gives up."""

Handler = Callable[[dict[str, Any]], Awaitable[web.StreamResponse]]


class ScriptedEngine:
    """Answers with a handler.

    Attributes:
        weight_version: what ``/model_info`` tells.
        is_healthy: what ``/health`` tells.
        checks: paths of the questions that were no requests.
    """

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.weight_version: object = 0
        self.is_healthy = True
        self.requests: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.checks: list[str] = []
        self.num_open = 0
        self.most_open = 0

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            return await self.handler(body)
        finally:
            self.num_open -= 1

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def health(self, request: web.Request) -> web.Response:
        self.checks.append("health")
        return web.Response(status=200 if self.is_healthy else 503)

    async def model_info(self, request: web.Request) -> web.Response:
        self.checks.append("model_info")
        return web.json_response({"weight_version": self.weight_version})

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_post("/generate", self.generate)
        application.router.add_post("/abort_request", self.abort)
        application.router.add_get("/health", self.health)
        application.router.add_get("/model_info", self.model_info)
        return application


@asynccontextmanager
async def connect(*engines: ScriptedEngine, **options: Any) -> AsyncIterator[EngineClient]:
    """A client of one model with these engines."""
    async with AsyncExitStack() as stack:
        urls = [
            str((await stack.enter_async_context(TestServer(e.application()))).make_url(""))
            for e in engines
        ]
        settings = {"first_backoff_seconds": 0.01, "longest_backoff_seconds": 0.05, **options}
        client = EngineClient(endpoints(*(url.rstrip("/") for url in urls)), **settings)
        yield await stack.enter_async_context(client)


def endpoints(*urls: str) -> Endpoints:
    model = ModelEndpoints("student", "http://127.0.0.1:9", urls, "folder", 64, VOCAB_SIZE)
    return Endpoints("http://127.0.0.1:9", {"student": model}, 1, 1, "elsewhere")


def generated(token_ids: list[int], **changes: Any) -> dict[str, Any]:
    meta = {
        "finish_reason": {"type": "length"},
        "weight_version": "4",
        "weight_versions": [
            {"version": "3", "start": 0, "end": 1},
            {"version": "4", "start": 1, "end": len(token_ids)},
        ],
        "output_token_logprobs": [[-0.5, token_id, None] for token_id in token_ids],
    }
    return {"output_ids": token_ids, "meta_info": meta | changes}


def scored(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What an engine says that gives each token -1."""
    ids = body["input_ids"][body["logprob_start_len"] :]
    entries = [[None if n == 0 else -1.0, token, None] for n, token in enumerate(ids)]
    return {"output_ids": [], "meta_info": {"input_token_logprobs": entries} | changes}


def answers(*statuses: int) -> Handler:
    """One status after the other; the last one again and again."""
    pending = list(statuses)

    async def handler(body: dict[str, Any]) -> web.Response:
        status = pending.pop(0) if len(pending) > 1 else pending[0]
        return web.json_response(generated([7, 8, 9]), status=status)

    return handler


async def ask(client: EngineClient, rid: str = "r", key: str | None = None) -> Generation:
    affinity = None if key is None else Affinity(key)
    return await client.generate("student", [1, 2], SAMPLING, rid=rid, affinity=affinity)


def serving(version: int) -> Handler:
    """Samples with weights of one version."""

    async def handler(body: dict[str, Any]) -> web.Response:
        meta = {"weight_version": str(version), "weight_versions": None}
        return web.json_response(generated([7], **meta))

    return handler


def run_bounded(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await test()

    asyncio.run(bounded())


async def never(body: dict[str, Any]) -> web.Response:
    await asyncio.sleep(10 * PATIENCE)
    raise AssertionError("unreachable")


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another task or process does."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)
