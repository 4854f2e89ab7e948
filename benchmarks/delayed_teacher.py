"""Teachers that answer late: one passes each request on to a real engine, one answers by itself.

Where engines and trainer share two cores, a score costs CPU time that nothing can hide. A teacher
that only lets one wait, as one on another machine does, shows what the rollout hides.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import aiohttp
import orjson
from aiohttp import web

LARGEST_REQUEST_BYTES = 512 << 20
TIMEOUT_SECONDS = 300.0
SCRIPTED_LOGPROB = -1.0
"""What a teacher without an engine gives every token, in nats."""


class Answering(Protocol):
    """Gives the body of a score's answer, on the server's event loop."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def answer(self, body: bytes) -> bytes: ...


@contextmanager
def delayed(answering: Answering, seconds: float) -> Iterator[str]:
    """The address of an engine that gives these answers ``seconds`` late."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="delayed-teacher", daemon=True)
    thread.start()
    server = _Server(answering, seconds)
    try:
        yield asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


class EngineAnswers:
    """Those of a real engine."""

    def __init__(self, engine_url: str) -> None:
        self._engine_url = engine_url
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
        )

    async def stop(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def answer(self, body: bytes) -> bytes:
        assert self._session is not None
        headers = {"Content-Type": "application/json"}
        url = f"{self._engine_url}/generate"
        async with self._session.post(url, data=body, headers=headers) as answer:
            answer.raise_for_status()
            return await answer.read()


class ScriptedAnswers:
    """The same number for every token, at next to no CPU time."""

    async def start(self) -> None:
        """Nothing is needed."""

    async def stop(self) -> None:
        """Nothing is open."""

    async def answer(self, body: bytes) -> bytes:
        request = orjson.loads(body)
        ids = request["input_ids"][request["logprob_start_len"] :]
        first, *rest = ids
        entries = [[None, first, None], *([SCRIPTED_LOGPROB, token, None] for token in rest)]
        meta = {
            "input_token_logprobs": entries,
            "weight_version": "0",
            "finish_reason": {"type": "length", "length": 0},
        }
        return orjson.dumps({"text": "", "output_ids": [], "meta_info": meta})


class _Server:
    def __init__(self, answering: Answering, seconds: float) -> None:
        self._answering = answering
        self._seconds = seconds
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        await self._answering.start()
        application = web.Application(client_max_size=LARGEST_REQUEST_BYTES)
        application.router.add_post("/generate", self._generate)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        await self._answering.stop()

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.read()
        await asyncio.sleep(self._seconds)
        return web.Response(
            body=await self._answering.answer(body), content_type="application/json"
        )
