"""Bounds the conversations under way over all batches; older batches go first.

A semaphore would serve in the order of asking: a trajectory of this step that is tried again would
then wait behind the whole batch of the next one.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class _Waiter:
    priority: int
    arrival: int
    turn: asyncio.Future[None] = field(compare=False)


class Slots:
    """A number of places; whoever waits with the smallest priority gets the next one.

    Args:
        count: places.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiters: list[_Waiter] = []
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def hold(self, priority: int) -> AsyncIterator[None]:
        """Hold a place; waits for one. Equal priorities are served in the order of asking."""
        await self._take(priority)
        try:
            yield
        finally:
            self._release()

    async def _take(self, priority: int) -> None:
        if self._free > 0:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters, _Waiter(priority, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release()  # the place came together with the cancellation
            raise

    def _release(self) -> None:
        while self._waiters:
            turn = heapq.heappop(self._waiters).turn
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
