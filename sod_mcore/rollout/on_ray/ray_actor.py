"""What runs inside a Ray actor: plays groups with services of its own, and reports them.

One asyncio loop runs every conversation, the tool calls and the scoring, as in the pool process.
Nothing here knows Ray: the class becomes an actor where it is started (``ray_handle.py``).
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path

from sod_mcore.rollout.group import Group, GroupResult, UnusableRowError
from sod_mcore.rollout.on_ray.group_messages import (
    ActorHost,
    ActorReport,
    ActorStart,
    GroupKey,
    GroupsOrder,
    SampleCounts,
)
from sod_mcore.rollout.pool import PoolSettings, describe_failure
from sod_mcore.rollout.services import RolloutServices, open_services
from sod_mcore.rollout.slots import Slots
from sod_mcore.tasks import cancel
from sod_mcore.timeline import SpanRecorder

_PROGRESS_SECONDS = 0.25
"""Between two reports that bring no finished group."""

logger = logging.getLogger(__name__)


class RolloutActor:
    """Plays the groups that it is given; its methods run one at a time, between two awaits.

    Args:
        settings: as the pool's, with this actor's share of what all actors have together.
        number: of this actor; whoever replaces it has the same.
    """

    def __init__(self, settings: PoolSettings, number: int) -> None:
        self._settings = settings
        self._number = number
        self._slots = Slots(settings.rollout.concurrency)
        self._stack = AsyncExitStack()
        self._opened: RolloutServices | None = None
        self._tasks: dict[GroupKey, asyncio.Task[None]] = {}
        self._finished: dict[GroupKey, GroupResult] = {}
        self._unusable: dict[GroupKey, str] = {}
        self._progress: dict[GroupKey, SampleCounts] = {}
        self._counts: dict[GroupKey, SampleCounts] = {}
        self._failure: str | None = None
        self._recorder = SpanRecorder()
        self._has_news = asyncio.Event()
        self._is_pressing = asyncio.Event()

    async def host(self) -> ActorHost:
        """Where it is; the first call, which is answered when the actor has a place."""
        return ActorHost.here()

    async def open(self, start: ActorStart) -> str | None:
        """Connect to the engines, start the sandbox and the verifiers.

        Returns:
            what keeps them from starting, in words for the user; some exceptions cannot travel.
        """
        try:
            log_path = self._settings.run_directory / f"rollout_actor_{self._number}.log"
            self._stack.enter_context(_logging_to(log_path))
            self._opened = await open_services(self._settings, self._stack)
            await self._opened.set_gate(start.is_gate_open)
            if start.weight_version is not None:
                self._opened.require_weights(start.weight_version)
        except Exception as error:
            logger.error("%s", traceback.format_exc())
            await self._stack.aclose()
            return describe_failure(error)
        return None

    async def begin(self, order: GroupsOrder) -> None:
        """Work on these groups beside the others."""
        if order.request.weight_version is not None:
            self._services.require_weights(order.request.weight_version)
        for position, prompt in zip(order.positions, order.request.prompts, strict=True):
            key = GroupKey(order.ticket, position)
            group = Group(
                prompt,
                order.request,
                self._services.batch_services,
                hold_slot=partial(self._slots.hold, order.priority),
                attempts=self._settings.rollout.attempts,
                recorder=self._recorder,
                on_sample=partial(self._count, key),
            )
            self._progress[key] = SampleCounts()
            self._tasks[key] = asyncio.create_task(self._play(key, group))

    async def cancel(self, keys: Iterable[GroupKey]) -> None:
        """End these groups, those that have ended aside; their requests to engines are aborted."""
        await cancel(*(self._tasks[key] for key in keys if key in self._tasks))

    async def report(self) -> ActorReport:
        """Wait for news; a finished group or a failure is told at once, the rest now and then."""
        await self._has_news.wait()
        if not self._is_pressing.is_set():
            await _wait_at_most(self._is_pressing, _PROGRESS_SECONDS)
        self._has_news.clear()
        self._is_pressing.clear()
        report = ActorReport(
            self._finished,
            self._counts,
            self._recorder.take(),
            self._services.counters(),
            self._unusable,
            self._failure,
        )
        self._finished, self._counts, self._unusable = {}, {}, {}
        return report

    async def set_gate(self, is_open: bool) -> None:
        """Let requests through to the engines, or hold them back until none is in flight."""
        await self._services.set_gate(is_open)

    async def close(self) -> None:
        """Give up what is under way, and end what was opened."""
        await self.cancel(list(self._tasks))
        await self._stack.aclose()

    async def _play(self, key: GroupKey, group: Group) -> None:
        try:
            self._finished[key] = await group.run()
            self._tell_at_once()
        except UnusableRowError as error:
            logger.error("%s", traceback.format_exc())
            self._unusable[key] = describe_failure(error)
            self._tell_at_once()
        except Exception as error:
            logger.error("%s", traceback.format_exc())
            self._failure = self._failure or describe_failure(error)
            self._tell_at_once()
        finally:
            self._counts.pop(key, None)
            del self._progress[key], self._tasks[key]

    def _count(self, key: GroupKey, is_dropped: bool) -> None:
        """One more sample of a group is over."""
        finished, dropped = self._progress[key]
        counts = SampleCounts(finished + (not is_dropped), dropped + is_dropped)
        self._progress[key] = self._counts[key] = counts
        self._has_news.set()

    def _tell_at_once(self) -> None:
        self._has_news.set()
        self._is_pressing.set()

    @property
    def _services(self) -> RolloutServices:
        assert self._opened is not None, "open() comes first"
        return self._opened


async def _wait_at_most(event: asyncio.Event, seconds: float) -> None:
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait((waiting,), timeout=seconds)
    waiting.cancel()


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Append this package's log messages to a file of the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    package = logging.getLogger("sod_mcore")
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()
