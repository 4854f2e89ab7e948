"""JSON over HTTP to the engines: one deadline a request, and one kind of error for all failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import orjson

Body = bytes | AsyncIterator[bytes] | None
"""What a request carries."""

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 4.0
"""An idle connection is used again within this time; SGLang 0.5.23 closes it after 5 s."""
TOO_MANY_REQUESTS = 429


class EngineError(Exception):
    """An engine refused a request (then ``retryable`` is False) or failed to answer it.

    Attributes:
        retryable: whether the same request may succeed later or on another engine.
        status: HTTP status of the answer; None if there was none, or not the whole of one.
    """

    def __init__(self, message: str, *, retryable: bool, status: int | None = None) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.status = status


class RequestTimeoutError(EngineError):
    """No answer came in time."""


class JsonHttp:
    """One pool of connections.

    Args:
        keep_alive: use connections again. A caller that keeps the event loop from running for
            seconds must not: it would not notice that the server has closed them.
    """

    def __init__(self, *, keep_alive: bool) -> None:
        connector = (
            aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
            if keep_alive
            else aiohttp.TCPConnector(limit=0, force_close=True)
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def get(self, url: str, seconds: float) -> dict[str, Any]:
        """GET a JSON document; {} where the answer is empty.

        Raises:
            EngineError: the server did not answer with 200 and JSON within ``seconds``.
        """
        return await self._request("GET", url, None, seconds)

    async def post(self, url: str, document: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """POST a JSON document; {} where the answer is empty.

        Raises:
            EngineError: the server did not answer with 200 and JSON within ``seconds``.
        """
        return await self._request("POST", url, orjson.dumps(document), seconds)

    async def post_stream(
        self, url: str, body: AsyncIterator[bytes], seconds: float
    ) -> dict[str, Any]:
        """POST a JSON document whose pieces are made while it is sent.

        Raises:
            EngineError: the server did not answer with 200 and JSON within ``seconds``.
        """
        return await self._request("POST", url, body, seconds)

    async def _request(self, method: str, url: str, body: Body, seconds: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(seconds):
                status, content = await self._exchange(method, url, body)
        except TimeoutError as error:
            message = f"{url}: no answer within {seconds:g} s"
            raise RequestTimeoutError(message, retryable=True) from error
        if status != 200:
            text = content.decode(errors="replace")[:1000]
            retryable = status >= 500 or status == TOO_MANY_REQUESTS
            message = f"{url} answered {status}: {text}"
            raise EngineError(message, retryable=retryable, status=status)
        try:
            document: dict[str, Any] = orjson.loads(content) if content else {}
        except orjson.JSONDecodeError as error:
            message = f"{url} did not answer with JSON: {error}"
            raise EngineError(message, retryable=True, status=status) from error
        return document

    async def _exchange(self, method: str, url: str, body: Body) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.request(method, url, data=body, headers=headers) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, ConnectionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise EngineError(f"{url}: {reason}", retryable=True) from error
