"""A gate in front of the engines, for whoever wants no request in flight.

Weight syncs do not need it: engines pause themselves, and requests go on with the new weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class RequestGate:
    """Counts requests in flight; when closed, new ones wait."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()
        self._is_open = True
        self._in_flight = 0

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Hold this around one engine request."""
        async with self._condition:
            await self._condition.wait_for(lambda: self._is_open)
            self._in_flight += 1
        try:
            yield
        finally:
            async with self._condition:
                self._in_flight -= 1
                self._condition.notify_all()

    async def set_open(self, is_open: bool) -> None:
        """Open the gate, or close it and wait until no request is in flight."""
        async with self._condition:
            self._is_open = is_open
            self._condition.notify_all()
            if not is_open:
                await self._condition.wait_for(lambda: self._in_flight == 0)
