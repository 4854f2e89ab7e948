"""One address for all served models: passes a request on by its ``model`` field.

SGLang's router 0.3.2 ignores ``model`` in ``/generate``, so one router cannot stand before two
models; this server chooses among the models' own routers and changes neither request nor answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp
import orjson
from aiohttp import web

PASSED_ON = ("/generate", "/v1/chat/completions", "/v1/completions")
LARGEST_REQUEST_BYTES = 512 * 2**20
CONNECT_SECONDS = 10.0
CONNECTION_HEADERS = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "content-encoding",
        "host",
    }
)
"""Headers about one connection, which do not travel on (RFC 9110, section 7.6.1), and the length
and encoding, which change when the body is decoded and sent in pieces."""


class FrontDoor:
    """An HTTP server that dispatches to one base URL a model.

    Args:
        routes: base URL by model name.
        host: interface to listen on.
        port: port to listen on; 0 takes a free one.
        timeout_seconds: longest wait for a whole answer.
    """

    def __init__(
        self, routes: Mapping[str, str], *, host: str, port: int, timeout_seconds: float
    ) -> None:
        self._routes = dict(routes)
        self._host = host
        self._port = port
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=CONNECT_SECONDS)
        self._timeout_seconds = timeout_seconds
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listen; returns the base URL.

        Raises:
            OSError: the port is taken.
        """
        application = web.Application(client_max_size=LARGEST_REQUEST_BYTES)
        application.router.add_get("/health", self._health)
        application.router.add_get("/models", self._models)
        for path in PASSED_ON:
            application.router.add_post(path, self._pass_on)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=self._timeout
        )
        # handler_cancellation: when a client goes away its request is dropped upstream as well.
        self._runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=1.0
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        port = self._runner.addresses[0][1]
        return f"http://{self._host}:{port}"

    async def stop(self) -> None:
        """Close all connections and stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return _json({"models": sorted(self._routes)}, 200)

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        try:
            fields = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            return _error(400, f"the request is not JSON: {error}")
        name = fields.get("model") if isinstance(fields, dict) else None
        if name not in self._routes:
            served = ", ".join(sorted(self._routes))
            return _error(404, f'model {name!r} is not served; set "model" to one of: {served}')
        assert self._session is not None
        answer: web.StreamResponse | None = None
        try:
            async with self._session.post(
                self._routes[name] + request.path,
                data=body,
                headers={
                    k: v for k, v in request.headers.items() if k.lower() not in CONNECTION_HEADERS
                },
            ) as upstream:
                answer = web.StreamResponse(status=upstream.status)
                for key, value in upstream.headers.items():
                    if key.lower() not in CONNECTION_HEADERS:
                        answer.headers.add(key, value)
                await answer.prepare(request)
                async for piece in upstream.content.iter_any():
                    await answer.write(piece)
                await answer.write_eof()
                return answer
        except TimeoutError:
            return _failed(answer, 504, f"{name}: no answer within {self._timeout_seconds:g} s")
        except aiohttp.ClientError as error:
            return _failed(answer, 502, f"{name}: {type(error).__name__}: {error}")


def _failed(begun: web.StreamResponse | None, status: int, message: str) -> web.StreamResponse:
    """An error answer; one that has begun can only be cut off, so that it is not taken as whole."""
    if begun is not None and begun.prepared:
        raise ConnectionResetError(message)
    return _error(status, message)


def _error(status: int, message: str) -> web.Response:
    return _json({"error": {"message": message}}, status)


def _json(content: dict[str, object], status: int) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")
