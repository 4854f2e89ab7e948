"""The driver's side of the actors: deals groups, gathers them into batches, replaces what dies.

It knows actors as :class:`ActorHandle` and not Ray, so that its decisions can be tested without a
cluster. All of it runs in one asyncio loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from sod_mcore.ray_cluster.connection import MISSES
from sod_mcore.ray_cluster.daemon_threads import in_thread
from sod_mcore.rollout.on_ray.group_batch import GroupBatch
from sod_mcore.rollout.on_ray.group_messages import ActorReport, ActorStart, GroupKey, GroupsOrder
from sod_mcore.rollout.pool import (
    CLOSE_TIMEOUT_SECONDS,
    RolloutError,
    SpanListener,
    Ticket,
    describe_failure,
)
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.serving.client.counters import ClientCounters, total
from sod_mcore.tasks import all_or_first_error, cancel

START_TRIES = 3
"""Of an actor in a new pool: Ray sends it to a node that has died until it has noticed that."""
_AGAIN_SECONDS = 1.0
"""Between two tries to put an actor in the place of one that died."""

logger = logging.getLogger(__name__)


class LostRayError(RolloutError):
    """Ray itself is gone: nothing may be asked of it any more."""


class ActorLostError(Exception):
    """An actor has died, or cannot be reached; the message says why."""


class ActorHandle(Protocol):
    """An actor; every call raises :class:`ActorLostError` when it dies meanwhile."""

    async def wait_for_place(self, timeout_seconds: float) -> str:
        """The machine that it runs on, once it does.

        Raises:
            RolloutError: no machine had room for it in time.
        """
        ...

    async def open(self, start: ActorStart, timeout_seconds: float) -> None:
        """Make it ready to play.

        Raises:
            RolloutError: its services did not start, with their own words for why.
        """
        ...

    async def begin(self, order: GroupsOrder) -> None: ...

    async def cancel(self, keys: Sequence[GroupKey]) -> None: ...

    async def report(self) -> ActorReport: ...

    async def set_gate(self, is_open: bool) -> None: ...

    async def close(self) -> None: ...

    def kill(self) -> None:
        """End it at once; not an error if it is gone."""
        ...


@dataclass
class _Member:
    """One of the actors, whoever it is at the time.

    Attributes:
        number: which of the prompts are its own.
        handle: None while it is being replaced.
        host: machine that it runs on, or ran on.
        counters: what happened to its requests.
        turn: orders reach it one after the other, since Ray may start calls in another order.
    """

    number: int
    handle: ActorHandle | None = None
    host: str = "a node that it never reached"
    counters: Mapping[str, ClientCounters] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True)
class _Batch:
    groups: GroupBatch
    result: Future[RolloutResult]
    on_progress: Callable[[RolloutProgress], None]


class RayDriver:
    """Plays batches on actors.

    Args:
        launch: starts the actor of a number; returns before it runs.
        num_actors: how many.
        attempts: times that a group is given to an actor.
        start_timeout_seconds: until an actor, or a successor, has a place and can play.
        on_spans: hears what was done when, from the loop's thread.
        check_cluster: raises LostRayError when there is nothing to play on any more.
        watch_seconds: between two checks.
    """

    def __init__(
        self,
        launch: Callable[[int], ActorHandle],
        *,
        num_actors: int,
        attempts: int,
        start_timeout_seconds: float,
        on_spans: SpanListener = lambda spans: None,
        check_cluster: Callable[[], None] = lambda: None,
        watch_seconds: float = 1.0,
    ) -> None:
        self._launch = launch
        self._attempts = attempts
        self._start_timeout_seconds = start_timeout_seconds
        self._on_spans = on_spans
        self._check_cluster = check_cluster
        self._watch_seconds = watch_seconds
        self._counters_of_lost: list[Mapping[str, ClientCounters]] = []
        self._members = [_Member(number) for number in range(num_actors)]
        self._tickets = itertools.count()
        self._batches: dict[Ticket, _Batch] = {}
        self._awaited: set[Future[RolloutResult]] = set()
        self._start_state = ActorStart()
        self._failure: RolloutError | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start every actor.

        Raises:
            RolloutError: one did not start.
        """
        await all_or_first_error([self._start_first(member) for member in self._members])
        for member in self._members:
            self._spawn(self._attend(member))
        self._spawn(self._watch())

    async def submit(
        self,
        request: RolloutRequest,
        result: Future[RolloutResult],
        on_progress: Callable[[RolloutProgress], None],
    ) -> Ticket:
        """Begin a batch, whose ``result`` is set when it is done.

        Raises:
            RolloutError: the pool has failed.
        """
        self.raise_failure()
        if request.weight_version is not None:
            self._start_state = dataclasses.replace(
                self._start_state, weight_version=request.weight_version
            )
        ticket = next(self._tickets)
        groups = GroupBatch(ticket, request, len(self._members), self._attempts)
        batch = self._batches[ticket] = _Batch(groups, result, on_progress)
        self._awaited.add(result)
        for member in self._members:
            self._give(member, groups)
        self._settle(ticket, batch)
        return ticket

    async def cancel(self, ticket: Ticket) -> None:
        """Give up a batch; its conversations are ended."""
        batch = self._batches.pop(ticket, None)
        if batch is not None:
            self._awaited.discard(batch.result)
            self._spawn(self._end_groups(batch))

    @property
    def counters(self) -> dict[str, ClientCounters]:
        """What happened to all requests to the engines, by model; may be read by any thread."""
        known = [*self._counters_of_lost, *(member.counters for member in self._members)]
        models = dict.fromkeys(model for counters in known for model in counters)
        return {m: total(counters[m] for counters in known if m in counters) for m in models}

    async def set_gate(self, is_open: bool) -> None:
        """Let requests through to the engines, or hold them back until none is in flight.

        Raises:
            RolloutError: the pool has failed.
        """
        self.raise_failure()
        self._start_state = dataclasses.replace(self._start_state, is_gate_open=is_open)

        await all_or_first_error([self._set_gate_of(member, is_open) for member in self._members])

    async def close(self) -> None:
        """Give up what is under way, and end the actors."""
        await cancel(*self._tasks)
        if isinstance(self._failure, LostRayError):
            return
        handles = [member.handle for member in self._members if member.handle]
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                await asyncio.gather(*(h.close() for h in handles), return_exceptions=True)
        for handle in handles:
            handle.kill()

    async def _attend(self, member: _Member) -> None:
        """Hear what an actor reports, for as long as the pool is open; replace it when it dies."""
        while True:
            assert member.handle is not None
            try:
                self._hear(member, await member.handle.report())
            except ActorLostError as error:
                await self._replace(member, str(error))

    def _hear(self, member: _Member, report: ActorReport) -> None:
        member.counters = report.counters
        self._on_spans(report.spans)
        if report.failure is not None:
            raise RolloutError(report.failure)
        for key, counts in report.counts.items():
            if key.ticket in self._batches:
                self._batches[key.ticket].groups.note(key.position, counts)
        for key, result in report.groups.items():
            if key.ticket in self._batches:
                self._batches[key.ticket].groups.take(key.position, result)
        for key, reason in report.unusable.items():
            if key.ticket in self._batches:
                batch = self._batches.pop(key.ticket)
                self._spawn(self._end(batch, RolloutError(reason)))
        for ticket in {key.ticket for key in (*report.counts, *report.groups)}:
            if ticket in self._batches:
                self._settle(ticket, self._batches[ticket])

    def _settle(self, ticket: Ticket, batch: _Batch) -> None:
        """Tell how far a batch is; complete one that is done."""
        batch.on_progress(batch.groups.progress)
        if batch.groups.is_done:
            del self._batches[ticket]
            self._spawn(self._end(batch))

    async def _end(self, batch: _Batch, error: RolloutError | None = None) -> None:
        """The result, or why there is none, is out when nothing of the batch is played any more."""
        await self._end_groups(batch)
        self._awaited.remove(batch.result)
        if error is None:
            batch.result.set_result(batch.groups.result())
        else:
            batch.result.set_exception(error)

    async def _end_groups(self, batch: _Batch) -> None:
        unfinished = [batch.groups.unfinished(member.number) for member in self._members]
        await all_or_first_error(
            [self._cancel(m, keys) for m, keys in zip(self._members, unfinished, strict=True)]
        )

    async def _cancel(self, member: _Member, keys: Sequence[GroupKey]) -> None:
        if not keys:
            return
        async with member.turn:  # not before the order has arrived that it cancels
            if member.handle is not None:
                with suppress(ActorLostError):
                    await member.handle.cancel(keys)

    async def _set_gate_of(self, member: _Member, is_open: bool) -> None:
        async with member.turn:  # what was ordered before is begun before
            if member.handle is not None:
                with suppress(ActorLostError):
                    await member.handle.set_gate(is_open)

    def _give(self, member: _Member, groups: GroupBatch) -> None:
        """Order a member's groups of a batch; one that is being replaced gets them later."""
        order = groups.order_for(member.number)
        if member.handle is not None and order.positions:
            self._spawn(self._begin(member, member.handle, order))

    async def _begin(self, member: _Member, handle: ActorHandle, order: GroupsOrder) -> None:
        async with member.turn:
            with suppress(ActorLostError):  # _attend meets it as well, and sees to the groups
                await handle.begin(order)

    async def _replace(self, member: _Member, cause: str) -> None:
        """Put another actor in the place of one that died, with the groups that it did not finish.

        Raises:
            RolloutError: none could be started in time.
        """
        loop = asyncio.get_running_loop()
        lost = loop.time()
        for _ in range(MISSES):  # first: a call to a Ray that is gone stops the whole process
            await in_thread(self._check_cluster)
            await asyncio.sleep(self._watch_seconds)
        assert member.handle is not None
        member.handle.kill()
        member.handle = None
        self._counters_of_lost.append(member.counters)
        member.counters = {}
        cause = f"rollout actor {member.number} on {member.host} died: {cause}"
        logger.warning("%s", cause)
        for ticket, batch in list(self._batches.items()):
            batch.groups.lose(member.number, cause)
            self._settle(ticket, batch)
        await self._start_again(member, cause)
        seconds = loop.time() - lost
        logger.warning(
            "rollout actor %d plays again, on %s, after %.0f s", member.number, member.host, seconds
        )
        for batch in self._batches.values():
            self._give(member, batch.groups)

    async def _start_first(self, member: _Member) -> None:
        for number in range(1, START_TRIES + 1):
            try:
                await self._start(member, self._start_timeout_seconds)
                return
            except ActorLostError as error:
                if number == START_TRIES:
                    raise RolloutError(
                        f"a rollout actor died at its start, {number} times: {error}"
                    ) from error
                logger.warning("rollout actor %d died at its start: %s", member.number, error)
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _start_again(self, member: _Member, cause: str) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_timeout_seconds
        while True:
            try:
                await self._start(member, deadline - loop.time())
                return
            except ActorLostError as error:
                if loop.time() + _AGAIN_SECONDS > deadline:
                    raise RolloutError(
                        f"{cause}; none could be started in its place within "
                        f"{self._start_timeout_seconds:.0f} s: {error}"
                    ) from error
                await asyncio.sleep(_AGAIN_SECONDS)

    async def _start(self, member: _Member, timeout_seconds: float) -> None:
        handle = await in_thread(partial(self._launch, member.number))
        try:
            member.host = await handle.wait_for_place(timeout_seconds)
            start = self._start_state
            await handle.open(start, timeout_seconds)
            while start.is_gate_open != self._start_state.is_gate_open:
                start = self._start_state
                await handle.set_gate(start.is_gate_open)
        except BaseException:
            handle.kill()
            raise
        member.handle = handle

    async def _watch(self) -> None:
        while True:
            await in_thread(self._check_cluster)
            await asyncio.sleep(self._watch_seconds)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if not isinstance(error, RolloutError):
            logger.error("the rollout's driver failed", exc_info=error)
            error = RolloutError(describe_failure(error))
        self._fail(error)

    def _fail(self, error: RolloutError) -> None:
        """The pool cannot go on: whoever waits for a batch hears why."""
        self._failure = self._failure or error
        self._batches.clear()
        for result in self._awaited:
            result.set_exception(self._failure)
        self._awaited.clear()
        for task in self._tasks:
            task.cancel()

    def raise_failure(self) -> None:
        """Say why the pool cannot go on, if so.

        Raises:
            RolloutError: it cannot.
        """
        if self._failure is not None:
            raise self._failure
