"""The driver's decisions, with actors that live in the same loop and die when told to."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pytest

from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.group import GroupResult
from sod_mcore.rollout.on_ray.group_messages import (
    ActorReport,
    ActorStart,
    GroupKey,
    GroupsOrder,
    SampleCounts,
)
from sod_mcore.rollout.on_ray.ray_driver import START_TRIES, ActorLostError, RayDriver
from sod_mcore.rollout.pool import RolloutError
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.rollout.token_recorder import TokenRecorder
from sod_mcore.serving.client.counters import ClientCounters
from sod_mcore.trajectory import Prompt, Trajectory

PATIENCE = 30.0
"""Seconds until a test that waits for something gives up."""


def request(prompts: int, samples: int = 2, spare: int = 0, urgent: bool = False) -> RolloutRequest:
    return RolloutRequest(
        tuple(Prompt((), "", "s", f"p{i}") for i in range(prompts + spare)),
        samples,
        Sampling(1.0, 1.0),
        spare_prompts=spare,
        is_urgent=urgent,
    )


def group(position: int, samples: int = 2) -> GroupResult:
    trajectories = tuple(trajectory(f"p{position}") for _ in range(samples))
    return GroupResult(trajectories, num_dropped=0, num_unscored=0, num_retries=0, failures=())


def trajectory(group_id: str) -> Trajectory:
    recorder = TokenRecorder(np.array([1], np.int32))
    recorder.append_turn(
        np.array([2], np.int32), np.array([-1.0], np.float32), np.array([0], np.int32)
    )
    return recorder.to_trajectory(group_id=group_id, reward=0.0, is_correct=False)


class FakeActor:
    """Does what it is told only when the test says so."""

    def __init__(self, number: int, open_error: Exception | None = None) -> None:
        self.number = number
        self.orders: list[GroupsOrder] = []
        self.cancelled: list[GroupKey] = []
        self.gate: list[bool] = []
        self.weight_version: int | None = None
        self.is_killed = False
        self.is_closed = False
        self._open_error = open_error
        self._news: asyncio.Queue[ActorReport | ActorLostError] = asyncio.Queue()

    async def wait_for_place(self, timeout_seconds: float) -> str:
        return "somewhere"

    async def open(self, start: ActorStart, timeout_seconds: float) -> None:
        self.gate.append(start.is_gate_open)
        self.weight_version = start.weight_version
        if self._open_error is not None:
            raise self._open_error

    async def begin(self, order: GroupsOrder) -> None:
        self.orders.append(order)

    async def cancel(self, keys: Sequence[GroupKey]) -> None:
        self.cancelled += keys

    async def report(self) -> ActorReport:
        news = await self._news.get()
        if isinstance(news, ActorLostError):
            raise news
        return news

    async def set_gate(self, is_open: bool) -> None:
        self.gate.append(is_open)

    async def close(self) -> None:
        self.is_closed = True

    def kill(self) -> None:
        self.is_killed = True

    def finish(self, ticket: int, *positions: int) -> None:
        """Report these groups as done."""
        done = {GroupKey(ticket, position): group(position) for position in positions}
        self._news.put_nowait(ActorReport(done))

    def tell(self, report: ActorReport) -> None:
        self._news.put_nowait(report)

    def die(self, cause: str = "out of memory") -> None:
        self._news.put_nowait(ActorLostError(cause))

    @property
    def positions(self) -> list[tuple[int, tuple[int, ...]]]:
        """Ticket and positions of each order."""
        return [(order.ticket, order.positions) for order in self.orders]


@dataclass
class Stage:
    """A driver and every actor that it ever started.

    Attributes:
        open_errors: what the next actors that are started say of their services.
    """

    num_actors: int = 2
    attempts: int = 3
    start_timeout_seconds: float = PATIENCE
    actors: list[FakeActor] = field(default_factory=list)
    open_errors: list[Exception] = field(default_factory=list)
    progress: list[RolloutProgress] = field(default_factory=list)

    def launch(self, number: int) -> FakeActor:
        error = self.open_errors.pop(0) if self.open_errors else None
        self.actors.append(FakeActor(number, error))
        return self.actors[-1]

    def driver(self) -> RayDriver:
        return RayDriver(
            self.launch,
            num_actors=self.num_actors,
            attempts=self.attempts,
            start_timeout_seconds=self.start_timeout_seconds,
            watch_seconds=0.01,
        )

    async def submit(
        self, driver: RayDriver, asked: RolloutRequest
    ) -> tuple[int, Future[RolloutResult]]:
        result: Future[RolloutResult] = Future()
        return await driver.submit(asked, result, self.progress.append), result


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


async def result_of(future: Future[RolloutResult]) -> RolloutResult:
    async with asyncio.timeout(PATIENCE):
        return await asyncio.wrap_future(future)


def play(stage: Stage, script: Callable[[RayDriver], Awaitable[None]]) -> None:
    async def work() -> None:
        driver = stage.driver()
        try:
            await driver.start()
            await script(driver)
        finally:
            await driver.close()

    asyncio.run(work())


def test_prompts_are_dealt_and_come_back_in_their_order() -> None:
    stage = Stage()

    async def script(driver: RayDriver) -> None:
        ticket, future = await stage.submit(driver, request(5))
        first, second = stage.actors
        await until(lambda: bool(first.orders and second.orders))
        assert first.positions == [(ticket, (0, 2, 4))]
        assert second.positions == [(ticket, (1, 3))]
        second.finish(ticket, 3, 1)
        first.finish(ticket, 4)
        first.finish(ticket, 2, 0)
        result = await result_of(future)
        assert [t.group_id for t in result.trajectories] == [f"p{i // 2}" for i in range(10)]
        assert (result.num_dropped, result.num_retries, result.num_cancelled) == (0, 0, 0)
        assert not first.cancelled
        assert not second.cancelled

    play(stage, script)
    assert all(actor.is_closed and actor.is_killed for actor in stage.actors)


def test_older_batches_and_urgent_ones_go_first() -> None:
    stage = Stage(num_actors=1)

    async def script(driver: RayDriver) -> None:
        for urgent in (False, False, True):
            await stage.submit(driver, request(1, urgent=urgent))
        (actor,) = stage.actors
        await until(lambda: len(actor.orders) == 3)
        assert [order.ticket for order in actor.orders] == [0, 1, 2]
        first, second, urgent_one = (order.priority for order in actor.orders)
        assert urgent_one < first < second

    play(stage, script)


def test_what_an_actor_did_not_finish_is_played_again() -> None:
    stage = Stage()

    async def script(driver: RayDriver) -> None:
        ticket, future = await stage.submit(driver, request(6))
        other, _ = await stage.submit(driver, request(2))
        lost, healthy = stage.actors
        lost.finish(ticket, 2)
        await until(lambda: RolloutProgress(2, 0, 12) in stage.progress)
        lost.die()
        await until(lambda: len(stage.actors) == 3)
        heir = stage.actors[2]
        assert (heir.number, lost.is_killed) == (0, True)
        await until(lambda: len(heir.orders) == 2)
        assert heir.positions == [(ticket, (0, 4)), (other, (0,))]
        assert len(healthy.orders) == 2, "nothing of the other actor is played again"
        heir.finish(ticket, 0, 4)
        healthy.finish(ticket, 1, 3, 5)
        result = await result_of(future)
        assert [t.group_id for t in result.trajectories] == [f"p{i // 2}" for i in range(12)]
        assert (result.num_dropped, result.num_retries) == (0, 4)
        assert result.failures == ("rollout actor 0 on somewhere died: out of memory",)

    play(stage, script)


def test_a_group_that_kills_its_actor_again_and_again_is_dropped() -> None:
    stage = Stage(num_actors=1, attempts=2)

    async def script(driver: RayDriver) -> None:
        ticket, future = await stage.submit(driver, request(2, samples=3))
        stage.actors[0].finish(ticket, 1)
        await until(lambda: bool(stage.progress) and stage.progress[-1].finished == 2)
        stage.actors[0].die("first cause")
        await until(lambda: len(stage.actors) == 2 and bool(stage.actors[1].orders))
        assert stage.actors[1].positions == [(ticket, (0,))]
        stage.actors[1].die("second cause")
        result = await result_of(future)
        assert [t.group_id for t in result.trajectories] == ["p1", "p1"]
        assert (result.num_dropped, result.num_retries) == (3, 3)
        assert ["first cause" in result.failures[0], "second cause" in result.failures[1]] == [
            True,
            True,
        ]
        assert stage.progress[-1] == RolloutProgress(2, 3, 5)

    play(stage, script)


def test_spare_prompts_are_cancelled_when_enough_are_done() -> None:
    stage = Stage()

    async def script(driver: RayDriver) -> None:
        ticket, future = await stage.submit(driver, request(2, spare=2))
        first, second = stage.actors
        await until(lambda: bool(first.orders and second.orders))
        second.finish(ticket, 3)
        first.finish(ticket, 0)
        result = await result_of(future)
        assert [t.group_id for t in result.trajectories] == ["p0", "p0", "p3", "p3"]
        assert result.num_cancelled == 4
        assert first.cancelled == [GroupKey(ticket, 2)]
        assert second.cancelled == [GroupKey(ticket, 1)]
        assert stage.progress[-1] == RolloutProgress(4, 0, 4)

    play(stage, script)


def test_a_group_too_many_does_not_count() -> None:
    """Two groups come in one report where one was missing."""
    stage = Stage(num_actors=1)

    async def script(driver: RayDriver) -> None:
        ticket, future = await stage.submit(driver, request(1, spare=1))
        stage.actors[0].finish(ticket, 1, 0)
        assert {t.group_id for t in (await result_of(future)).trajectories} == {"p1"}

    play(stage, script)


def test_progress_counts_samples_of_unfinished_groups() -> None:
    stage = Stage(num_actors=1)

    async def script(driver: RayDriver) -> None:
        ticket, _ = await stage.submit(driver, request(2))
        counts = {GroupKey(ticket, 1): SampleCounts(finished=1)}
        stage.actors[0].tell(ActorReport({}, counts))
        await until(lambda: stage.progress[-1] == RolloutProgress(1, 0, 4))
        stage.actors[0].die()
        await until(lambda: stage.progress[-1] == RolloutProgress(0, 0, 4))

    play(stage, script)


def test_a_failure_on_an_actor_ends_the_pool_in_its_words() -> None:
    stage = Stage()
    message = "rollout pool: KeyError: 'a fault of ours'"

    async def script(driver: RayDriver) -> None:
        _, future = await stage.submit(driver, request(2))
        stage.actors[0].tell(ActorReport(failure=message))
        with pytest.raises(RolloutError, match=message):
            await result_of(future)
        for again in (driver.set_gate(True), stage.submit(driver, request(1))):
            with pytest.raises(RolloutError, match=message):
                await again

    play(stage, script)


def test_an_unusable_row_ends_its_own_batch_only() -> None:
    stage = Stage()
    message = "rollout pool: UnusableRowError: p1: the ground truth is empty"

    async def script(driver: RayDriver) -> None:
        early, early_future = await stage.submit(driver, request(2))
        late, late_future = await stage.submit(driver, request(4))
        first, second = stage.actors
        await until(lambda: len(first.orders) == len(second.orders) == 2)
        second.tell(ActorReport(unusable={GroupKey(late, 1): message}))
        with pytest.raises(RolloutError, match=message):
            await result_of(late_future)
        assert first.cancelled == [GroupKey(late, 0), GroupKey(late, 2)]
        assert GroupKey(late, 3) in second.cancelled
        first.finish(early, 0)
        second.finish(early, 1)
        assert len((await result_of(early_future)).trajectories) == 4

    play(stage, script)


def test_the_gate_holds_for_a_successor_too() -> None:
    stage = Stage()

    async def script(driver: RayDriver) -> None:
        await driver.set_gate(False)
        stage.actors[0].die()
        await until(lambda: len(stage.actors) == 3 and bool(stage.actors[2].gate))
        await driver.set_gate(True)
        await until(lambda: stage.actors[2].gate[-1])

    play(stage, script)
    first, second, heir = (actor.gate for actor in stage.actors)
    assert (first, second) == ([True, False], [True, False, True])
    assert heir == [False, True]


def test_an_actor_that_does_not_start_keeps_the_pool_from_starting() -> None:
    stage = Stage(open_errors=[RolloutError("rollout pool: FleetError: no engines")])
    with pytest.raises(RolloutError, match="FleetError: no engines"):
        play(stage, lambda driver: asyncio.sleep(0))
    assert all(actor.is_killed for actor in stage.actors)


def test_an_actor_that_dies_at_its_start_is_started_again() -> None:
    """Ray may have sent it to a node that has just died."""
    errors: list[Exception] = [ActorLostError("its node died")] * (START_TRIES - 1)
    stage = Stage(num_actors=1, open_errors=errors)

    async def script(driver: RayDriver) -> None:
        ticket, future = await stage.submit(driver, request(1))
        await until(lambda: bool(stage.actors[-1].orders))
        stage.actors[-1].finish(ticket, 0)
        assert (await result_of(future)).num_retries == 0

    play(stage, script)
    assert len(stage.actors) == START_TRIES


def test_one_that_always_dies_at_its_start_is_one_clear_error() -> None:
    errors: list[Exception] = [ActorLostError("no such module")] * START_TRIES
    stage = Stage(num_actors=1, open_errors=errors)
    with pytest.raises(RolloutError, match="died at its start, 3 times: no such module"):
        play(stage, lambda driver: asyncio.sleep(0))
    assert all(actor.is_killed for actor in stage.actors)


def test_a_successor_that_dies_at_its_start_is_replaced_as_well() -> None:
    stage = Stage(num_actors=1)

    async def script(driver: RayDriver) -> None:
        ticket, future = await stage.submit(driver, request(1))
        stage.open_errors = [ActorLostError("its node went away")]
        stage.actors[0].die()
        await until(lambda: len(stage.actors) == 3 and bool(stage.actors[2].orders))
        stage.actors[2].finish(ticket, 0)
        assert (await result_of(future)).num_retries == 2

    play(stage, script)


def test_no_successor_in_time_is_one_clear_error() -> None:
    stage = Stage(num_actors=1, start_timeout_seconds=0.5)

    async def script(driver: RayDriver) -> None:
        _, future = await stage.submit(driver, request(1))
        stage.open_errors = [ActorLostError("its node went away")]
        stage.actors[0].die()
        with pytest.raises(RolloutError, match=r"out of memory; none.*its place.*went away"):
            await result_of(future)

    play(stage, script)


def test_a_batch_without_prompts_is_done() -> None:
    stage = Stage()

    async def script(driver: RayDriver) -> None:
        _, future = await stage.submit(driver, request(0))
        assert (await result_of(future)).trajectories == ()

    play(stage, script)


def test_a_successor_knows_the_oldest_weights_that_may_sample() -> None:
    stage = Stage(num_actors=1)

    async def script(driver: RayDriver) -> None:
        await stage.submit(driver, dataclasses.replace(request(1), weight_version=4))
        await stage.submit(driver, request(1))
        stage.actors[0].die()
        await until(lambda: len(stage.actors) == 2)
        await until(lambda: len(stage.actors[1].orders) == 2)

    play(stage, script)
    assert [actor.weight_version for actor in stage.actors] == [None, 4]


def test_a_batch_that_nobody_waits_for_is_ended() -> None:
    stage = Stage(num_actors=1)

    async def script(driver: RayDriver) -> None:
        ticket, _ = await stage.submit(driver, request(2))
        other, future = await stage.submit(driver, request(1))
        (actor,) = stage.actors
        await driver.cancel(ticket)
        await until(lambda: len(actor.cancelled) == 2)
        assert actor.cancelled == [GroupKey(ticket, 0), GroupKey(ticket, 1)]
        actor.die()
        await until(lambda: len(stage.actors) == 2 and bool(stage.actors[1].orders))
        assert stage.actors[1].positions == [(other, (0,))]
        stage.actors[1].finish(other, 0)
        await result_of(future)

    play(stage, script)


def test_requests_of_actors_that_died_stay_counted() -> None:
    stage = Stage()

    async def script(driver: RayDriver) -> None:
        for actor, count in zip(stage.actors, (3, 5), strict=True):
            counters = ClientCounters(requests=count, seconds_waited=0.5)
            actor.tell(ActorReport(counters={"student": counters}))
        await until(lambda: driver.counters.get("student", ClientCounters()).requests == 8)
        stage.actors[0].die()
        await until(lambda: len(stage.actors) == 3)
        stage.actors[2].tell(ActorReport(counters={"student": ClientCounters(requests=10)}))
        await until(lambda: driver.counters["student"].requests == 18)
        assert driver.counters["student"].seconds_waited == 1.0

    play(stage, script)
