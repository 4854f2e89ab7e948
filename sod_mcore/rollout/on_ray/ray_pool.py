"""The rollout pool as Ray actors, on this machine or over a cluster.

The driver (``ray_driver.py``) runs in a thread of its own, so that actors are served and replaced
while the trainer works. What the trainer calls only hands over and waits.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from sod_mcore.rollout.on_ray.ray_cluster import ray_cluster
from sod_mcore.rollout.on_ray.ray_driver import RayDriver
from sod_mcore.rollout.on_ray.ray_handle import RayHandle
from sod_mcore.rollout.pool import (
    CLOSE_TIMEOUT_SECONDS,
    POLL_SECONDS,
    START_TIMEOUT_SECONDS,
    PoolSettings,
    RolloutError,
    RolloutInterruptedError,
    RolloutPool,
    SpanListener,
    Ticket,
)
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.serving.client.counters import ClientCounters
from sod_mcore.timeline import Spans

_MARGIN_SECONDS = 10.0
"""Beyond a time limit of the driver's own, so that its message is what the user sees."""

Result = TypeVar("Result")


@dataclass
class _Pending:
    """A batch that has not been collected; the driver writes, whoever collects reads."""

    result: Future[RolloutResult] = field(default_factory=Future)
    progress: RolloutProgress | None = None
    told: RolloutProgress | None = None

    def hear(self, progress: RolloutProgress) -> None:
        """Note how far the batch is."""
        self.progress = progress

    def tell(self, listener: Callable[[RolloutProgress], None] | None) -> None:
        """Pass on how far it is, where that is news."""
        progress = self.progress
        if listener is not None and progress is not None and progress != self.told:
            self.told = progress
            listener(progress)


class RayPool(RolloutPool):
    """Plays batches on Ray actors; may be used from several threads.

    Args:
        settings: as for the process pool.
        on_spans: hears what was done when, in calls of the pool's own.
        start_timeout_seconds: until an actor, or one that takes the place of another, can play.
    """

    def __init__(
        self,
        settings: PoolSettings,
        on_spans: SpanListener = lambda spans: None,
        start_timeout_seconds: float = START_TIMEOUT_SECONDS,
    ) -> None:
        """Connect to Ray, start the actors and wait until they have reached the engines.

        Raises:
            ConfigError: the cluster cannot be joined, or is too small.
            RolloutError: Ray or an actor did not start, with its own words for why.
        """
        rollout = settings.rollout
        self._on_spans = on_spans
        self._spans: queue.SimpleQueue[Spans] = queue.SimpleQueue()
        self._pending: dict[Ticket, _Pending] = {}
        with ExitStack() as stack:
            check = stack.enter_context(ray_cluster(rollout, settings.run_directory))
            self._loop = stack.enter_context(_running_loop())
            self._driver = RayDriver(
                partial(RayHandle, settings),
                num_actors=rollout.ray_actors,
                attempts=rollout.attempts,
                start_timeout_seconds=start_timeout_seconds,
                on_spans=self._spans.put,
                check_cluster=check,
            )
            stack.callback(self._close_driver)
            self._run(self._driver.start(), 2 * start_timeout_seconds + _MARGIN_SECONDS, "start")
            self._stack = stack.pop_all()

    def submit(self, request: RolloutRequest) -> Ticket:
        pending = _Pending()
        submitted = self._driver.submit(request, pending.result, pending.hear)
        ticket = self._run(submitted, _MARGIN_SECONDS, "take a batch")
        self._pending[ticket] = pending
        return ticket

    def collect(
        self,
        ticket: Ticket,
        timeout_seconds: float,
        on_progress: Callable[[RolloutProgress], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> RolloutResult:
        pending = self._pending[ticket]
        deadline = time.monotonic() + timeout_seconds
        while not wait((pending.result,), POLL_SECONDS).done:
            if should_stop():
                raise RolloutInterruptedError
            if time.monotonic() > deadline:
                raise RolloutError(_overdue("finish a batch", timeout_seconds))
            self._tell_spans()
            pending.tell(on_progress)
        self._tell_spans()
        del self._pending[ticket]
        pending.tell(on_progress)
        return pending.result.result()

    def cancel(self, ticket: Ticket) -> None:
        self._pending.pop(ticket, None)
        self._run(self._driver.cancel(ticket), _MARGIN_SECONDS, "give up a batch")

    def hear(self) -> None:
        self._tell_spans()
        self._driver.raise_failure()

    @property
    def counters(self) -> Mapping[str, ClientCounters]:
        """Of all requests until the last report of each actor."""
        return self._driver.counters

    def pause(self, timeout_seconds: float = 60.0) -> None:
        self._run(self._driver.set_gate(False), timeout_seconds, "pause")

    def resume(self, timeout_seconds: float = 60.0) -> None:
        self._run(self._driver.set_gate(True), timeout_seconds, "resume")

    def close(self) -> None:
        self._stack.close()

    def _tell_spans(self) -> None:
        while not self._spans.empty():
            self._on_spans(self._spans.get())

    def _close_driver(self) -> None:
        self._run(self._driver.close(), CLOSE_TIMEOUT_SECONDS + _MARGIN_SECONDS, "close")

    def _run(
        self, work: Coroutine[Any, Any, Result], timeout_seconds: float, action: str
    ) -> Result:
        """Let the driver do something, and wait for it.

        Raises:
            RolloutError: it took too long, or the pool has failed.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        if not wait((future,), timeout_seconds).done:
            future.cancel()
            raise RolloutError(_overdue(action, timeout_seconds))
        return future.result()


def _overdue(action: str, timeout_seconds: float) -> str:
    return f"the rollout pool did not {action} within {timeout_seconds:.0f} s"


@contextmanager
def _running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An asyncio loop in a thread of its own; what still runs in it at the end is cancelled."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def run() -> None:
        is_over = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), is_over))
        await is_over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="rollout-driver", daemon=True)
    thread.start()
    loop, is_over = started.result()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(is_over.set)
        thread.join(_MARGIN_SECONDS)
