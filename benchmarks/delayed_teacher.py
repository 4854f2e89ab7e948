"""A teacher's engine that answers late: passes each request on to a real engine after a pause.

Where engines and trainer share two cores, a score costs CPU time that nothing can hide. A teacher
that only lets one wait, as one on another machine does, shows what the rollout hides.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
from aiohttp import web

LARGEST_REQUEST_BYTES = 512 << 20
TIMEOUT_SECONDS = 300.0


@contextmanager
def delayed(engine_url: str, seconds: float) -> Iterator[str]:
    """The address of an engine like that at ``engine_url``, but ``seconds`` later."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="delayed-teacher", daemon=True)
    thread.start()
    proxy = _Proxy(engine_url, seconds)
    try:
        yield asyncio.run_coroutine_threadsafe(proxy.start(), loop).result(30)
    finally:
        asyncio.run_coroutine_threadsafe(proxy.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


class _Proxy:
    def __init__(self, engine_url: str, seconds: float) -> None:
        self._engine_url = engine_url
        self._seconds = seconds
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        application = web.Application(client_max_size=LARGEST_REQUEST_BYTES)
        application.router.add_post("/generate", self._generate)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
        )
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    async def _generate(self, request: web.Request) -> web.Response:
        assert self._session is not None
        body = await request.read()
        await asyncio.sleep(self._seconds)
        headers = {"Content-Type": "application/json"}
        url = f"{self._engine_url}/generate"
        async with self._session.post(url, data=body, headers=headers) as answer:
            return web.Response(
                body=await answer.read(), status=answer.status, content_type="application/json"
            )
