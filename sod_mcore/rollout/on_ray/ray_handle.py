"""An actor in Ray, as the driver sees it: starts it, calls it, and knows when it is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sod_mcore.config import ToolsConfig
from sod_mcore.ray_cluster.connection import one_line
from sod_mcore.ray_cluster.daemon_threads import call_in_thread, in_thread
from sod_mcore.rollout.group import GroupResult
from sod_mcore.rollout.on_ray.group_messages import (
    ActorHost,
    ActorReport,
    ActorStart,
    GroupKey,
    GroupsOrder,
)
from sod_mcore.rollout.on_ray.ray_actor import RolloutActor
from sod_mcore.rollout.on_ray.ray_driver import ActorLostError
from sod_mcore.rollout.pool import PoolSettings, RolloutError
from sod_mcore.timeline import Spans
from sod_mcore.tools import choose_sandbox_url
from sod_mcore.trajectory import Trajectory

_ANSWER_SECONDS = 60.0
"""For calls that an actor answers at once, or after it has aborted its requests."""


class RayHandle:
    """A Ray actor that is being started, or runs.

    Args:
        settings: of the whole pool.
        number: of the actor.
    """

    def __init__(self, settings: PoolSettings, number: int) -> None:
        import ray

        self._number, self._num_actors = number, settings.rollout.ray_actors
        self._clock_ahead = 0.0
        self._cpus = settings.rollout.ray_actor_cpus
        self._log_path = settings.run_directory / f"rollout_actor_{number}.log"
        options = {"num_cpus": self._cpus, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(RolloutActor).options(**options)
        self._actor = actor.remote(actor_settings(settings, number), number)

    async def wait_for_place(self, timeout_seconds: float) -> str:
        """The machine that it runs on, once it does.

        Raises:
            ActorLostError: it died.
            RolloutError: no node had room for it in time.
        """
        import ray

        try:
            async with asyncio.timeout(timeout_seconds):
                await self._call("host")
                asked = time.monotonic()
                host: ActorHost = await self._call("host")
        except TimeoutError as error:
            free = (await in_thread(ray.available_resources)).get("CPU", 0.0)
            raise RolloutError(
                f"Ray found no node for a rollout actor within {timeout_seconds:.0f} s: it "
                f"reserves {self._cpus:g} CPUs (rollout.ray_actor_cpus), and {free:g} are free in "
                "the whole cluster; add a node, or lower rollout.ray_actors"
            ) from error
        if host.boot != ActorHost.here().boot:
            self._clock_ahead = host.clock - (asked + time.monotonic()) / 2
        return host.name

    async def open(self, start: ActorStart, timeout_seconds: float) -> None:
        """Make it ready to play.

        Raises:
            ActorLostError: it died.
            RolloutError: its services did not start.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                failure = await self._call("open", start)
        except TimeoutError as error:
            raise RolloutError(
                f"a rollout actor did not start within {timeout_seconds:.0f} s; its log is "
                f"{self._log_path}"
            ) from error
        if failure is not None:
            raise RolloutError(failure)

    async def begin(self, order: GroupsOrder) -> None:
        """Let it work on groups."""
        await self._call_at_once("begin", order)

    async def cancel(self, keys: Sequence[GroupKey]) -> None:
        """End groups; returns when their requests are aborted."""
        await self._call_at_once("cancel", keys)

    async def report(self) -> ActorReport:
        """What has happened; waits until something has."""
        report: ActorReport = await self._call("report")
        groups = {key: _detached(group) for key, group in report.groups.items()}
        return dataclasses.replace(report, groups=groups, spans=self._placed(report.spans))

    def _placed(self, spans: Spans) -> Spans:
        """The same spans on the clock of this machine, in lanes that no other actor uses."""
        return dataclasses.replace(
            spans,
            starts=spans.starts - self._clock_ahead,
            ends=spans.ends - self._clock_ahead,
            lanes=spans.lanes * self._num_actors + self._number,
            kinds=np.array(spans.kinds),
            labels=np.array(spans.labels),
        )

    async def set_gate(self, is_open: bool) -> None:
        """Let its requests through, or hold them back; returns when none is in flight."""
        await self._call("set_gate", is_open)

    async def close(self) -> None:
        """End its services in order."""
        await self._call("close")

    def kill(self) -> None:
        """End it at once; does not wait for that."""
        import ray

        call_in_thread(partial(ray.kill, self._actor), "ray-kill")

    async def _call_at_once(self, method: str, *arguments: object) -> None:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._call(method, *arguments)
        except TimeoutError as error:
            self.kill()  # whoever waits for its report then hears that it is lost
            raise ActorLostError(f"no answer within {_ANSWER_SECONDS:.0f} s") from error

    async def _call(self, method: str, *arguments: object) -> Any:
        """The answer to a call.

        Raises:
            ActorLostError: the actor, its node or the answer is gone.
            RolloutError: the method failed, which it should not.
        """
        from ray.exceptions import RayError, RayTaskError

        try:
            return await getattr(self._actor, method).remote(*arguments)
        except RayTaskError as error:
            raise RolloutError(f"rollout pool: {method}: {error}") from error
        except RayError as error:
            raise ActorLostError(one_line(error)) from error


def actor_settings(settings: PoolSettings, number: int) -> PoolSettings:
    """The settings of one actor: its share of what all of them have together, and paths that hold
    in whatever folder it runs."""
    num_actors = settings.rollout.ray_actors

    def share(total: int) -> int:
        return max(1, total // num_actors + (number < total % num_actors))

    serving, rollout = settings.serving, settings.rollout
    return dataclasses.replace(
        settings,
        run_directory=settings.run_directory.absolute(),
        serving_directory=settings.serving_directory.absolute(),
        student_path=settings.student_path.absolute(),
        serving=dataclasses.replace(serving, max_connections=share(serving.max_connections)),
        rollout=dataclasses.replace(rollout, concurrency=share(rollout.concurrency)),
        tools=_tools_anywhere(settings.tools),
    )


def _tools_anywhere(tools: ToolsConfig) -> ToolsConfig:
    """The same tools for a process with another folder and other environment variables."""
    documents = tools.search_documents
    return dataclasses.replace(
        tools,
        sandbox_url=choose_sandbox_url(tools.sandbox_url),
        packages=tuple(str(Path(path).absolute()) for path in tools.packages),
        search_documents=documents and str(Path(documents).absolute()),
    )


def _detached(group: GroupResult) -> GroupResult:
    """The same group with arrays of its own: Ray's lie in its object store and cannot be written,
    and would keep it full."""
    trajectories = tuple(_with_own_arrays(trajectory) for trajectory in group.trajectories)
    return dataclasses.replace(group, trajectories=trajectories)


def _with_own_arrays(trajectory: Trajectory) -> Trajectory:
    values = {f.name: getattr(trajectory, f.name) for f in dataclasses.fields(trajectory)}
    own: dict[str, Any] = {n: np.array(v) for n, v in values.items() if isinstance(v, np.ndarray)}
    return dataclasses.replace(trajectory, **own)
