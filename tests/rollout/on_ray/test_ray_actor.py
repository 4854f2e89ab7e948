"""What an actor does with its groups, without Ray: it plays, reports, gives up and fails."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.rewards import RewardResult
from sod_mcore.rollout.gate import RequestGate
from sod_mcore.rollout.group import BatchServices
from sod_mcore.rollout.lanes import Track
from sod_mcore.rollout.on_ray import ray_actor
from sod_mcore.rollout.on_ray.group_messages import ActorStart, GroupKey, GroupsOrder, SampleCounts
from sod_mcore.rollout.on_ray.ray_actor import RolloutActor
from sod_mcore.rollout.pool import PoolSettings
from sod_mcore.rollout.request import RolloutRequest
from sod_mcore.rollout.services import RolloutServices
from sod_mcore.serving.client.counters import ClientCounters
from sod_mcore.serving.endpoints import FleetError
from sod_mcore.trajectory import Prompt, Trajectory
from tests.rollout.input_engine import pool_settings, sums
from tests.rollout.on_ray.test_ray_driver import trajectory

PATIENCE = 30.0


@dataclass(frozen=True)
class FakeRolloutServices:
    """Stands for the connections to the engines."""

    batch_services: BatchServices
    gate: RequestGate
    required: list[int]

    def require_weights(self, version: int) -> None:
        self.required.append(version)

    def counters(self) -> dict[str, ClientCounters]:
        return {"student": ClientCounters(requests=7)}

    async def set_gate(self, is_open: bool) -> None:
        await self.gate.set_open(is_open)


class Services:
    """Play when the test says so.

    Attributes:
        begun: prompts in the order in which their conversations began.
        ended: those that were given up.
        free: how many more conversations of a prompt may end.
    """

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.free: Counter[str] = Counter()
        self.unusable: set[str] = set()
        self.is_closed = False
        self.required: list[int] = []

    async def episode(self, prompt: Prompt, request: RolloutRequest, track: Track) -> Trajectory:
        self.begun.append(prompt.prompt_id)
        try:
            while self.free[prompt.prompt_id] == 0:
                await asyncio.sleep(0)
            self.free[prompt.prompt_id] -= 1
        except asyncio.CancelledError:
            self.ended.append(prompt.prompt_id)
            raise
        return trajectory(prompt.prompt_id)

    async def reward(self, prompt: Prompt, trajectory: Trajectory) -> RewardResult:
        if prompt.prompt_id in self.unusable:
            raise ValueError("the ground truth is empty")
        return RewardResult(1.0, "right", "5", {"answer": 1.0})

    async def score(self, prompt: Prompt, trajectory: Trajectory, track: Track) -> Trajectory:
        return trajectory

    async def open(self, settings: PoolSettings, stack: AsyncExitStack) -> FakeRolloutServices:
        stack.callback(self._close)
        bound = BatchServices(self.episode, self.reward, self.score, RuntimeError)
        return FakeRolloutServices(bound, RequestGate(), self.required)

    def _close(self) -> None:
        self.is_closed = True


def order(
    ticket: int,
    positions: tuple[int, ...],
    priority: int,
    samples: int = 1,
    weight_version: int | None = None,
) -> GroupsOrder:
    request = sums(max(positions) + 1, samples)
    prompts = tuple(request.prompts[position] for position in positions)
    part = dataclasses.replace(request, prompts=prompts, weight_version=weight_version)
    return GroupsOrder(ticket, priority, part, positions)


def play(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[[RolloutActor, Services], Awaitable[None]],
    **rollout: Any,
) -> Services:
    services = Services()
    monkeypatch.setattr(ray_actor, "open_services", services.open)

    async def work() -> None:
        actor = RolloutActor(pool_settings(folder, rollout), 0)
        async with asyncio.timeout(PATIENCE):
            assert await actor.open(ActorStart(weight_version=2)) is None
            await script(actor, services)
            await actor.close()

    asyncio.run(work())
    assert services.is_closed
    return services


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def groups_of(actor: RolloutActor, count: int) -> dict[GroupKey, list[str]]:
    """Prompts of the trajectories of the next finished groups."""
    groups: dict[GroupKey, list[str]] = {}
    while len(groups) < count:
        report = await actor.report()
        assert report.failure is None
        groups |= {k: [t.group_id for t in g.trajectories] for k, g in report.groups.items()}
    return groups


def test_groups_are_reported_as_they_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(actor: RolloutActor, services: Services) -> None:
        await actor.begin(order(7, (1, 3), priority=7, samples=2))
        services.free["p3"] = 2
        assert await groups_of(actor, 1) == {GroupKey(7, 3): ["p3", "p3"]}
        services.free["p1"] = 2
        assert await groups_of(actor, 1) == {GroupKey(7, 1): ["p1", "p1"]}

    play(tmp_path, monkeypatch, script)


def test_free_slots_go_by_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(actor: RolloutActor, services: Services) -> None:
        await actor.begin(order(1, (0, 1), priority=1))
        await until(lambda: services.begun == ["p0"])
        await actor.begin(order(2, (2,), priority=2))
        await actor.begin(order(0, (3,), priority=0))
        for _ in range(10):  # until all of them wait for the slot
            await asyncio.sleep(0)
        services.free.update(["p0", "p1", "p2", "p3"])
        await groups_of(actor, 4)

    assert play(tmp_path, monkeypatch, script, concurrency=1).begun == ["p0", "p3", "p1", "p2"]


def test_cancelled_groups_end_and_are_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(actor: RolloutActor, services: Services) -> None:
        await actor.begin(order(0, (0, 1), priority=0))
        await until(lambda: len(services.begun) == 2)
        await actor.cancel([GroupKey(0, 1), GroupKey(5, 5)])
        assert services.ended == ["p1"]
        services.free.update(["p0", "p1"])
        assert await groups_of(actor, 1) == {GroupKey(0, 0): ["p0"]}

    play(tmp_path, monkeypatch, script)


def test_an_unusable_row_is_told_in_the_words_of_the_process_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(actor: RolloutActor, services: Services) -> None:
        services.free["p0"] = 1
        services.unusable.add("p0")
        await actor.begin(order(0, (0,), priority=0))
        reason = "rollout pool: UnusableRowError: p0: the ground truth is empty"
        report = await actor.report()
        assert (report.unusable, report.failure) == ({GroupKey(0, 0): reason}, None)
        services.free["p1"] = 2
        await actor.begin(order(1, (1,), priority=1))
        report = await actor.report()
        assert list(report.groups) == [GroupKey(1, 1)]
        assert not report.unusable, "it is told once"

    play(tmp_path, monkeypatch, script)
    assert "UnusableRowError" in (tmp_path / "rollout_actor_0.log").read_text()


def test_samples_of_an_unfinished_group_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(actor: RolloutActor, services: Services) -> None:
        await actor.begin(order(0, (0,), priority=0, samples=2))
        services.free["p0"] = 1
        report = await actor.report()
        assert report.counts == {GroupKey(0, 0): SampleCounts(finished=1)}
        assert (report.groups, report.failure) == ({}, None)
        assert [(span.kind, span.label) for span in report.spans] == [("reward", "p0")]
        assert report.counters == {"student": ClientCounters(requests=7)}

    play(tmp_path, monkeypatch, script)


def test_services_that_do_not_start_are_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(settings: PoolSettings, stack: AsyncExitStack) -> RolloutServices:
        raise FleetError("there are no engines")

    monkeypatch.setattr(ray_actor, "open_services", fail)
    failure = asyncio.run(RolloutActor(pool_settings(tmp_path, {}), 0).open(ActorStart()))
    assert failure == "rollout pool: FleetError: there are no engines"


def test_engines_need_the_weights_of_the_newest_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(actor: RolloutActor, services: Services) -> None:
        await actor.begin(order(0, (0,), priority=0, weight_version=3))
        await actor.begin(order(1, (0,), priority=1))

    assert play(tmp_path, monkeypatch, script).required == [2, 3]
