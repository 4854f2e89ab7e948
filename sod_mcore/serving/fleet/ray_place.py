"""One engine on a node of a Ray cluster: in an actor, which holds the room that is reserved for it.

An engine that dies is started again by its actor. With its actor or its node it dies as well; then
another actor is started in the same room, which Ray moves to another node where the node is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sod_mcore.ray_cluster.connection import one_line
from sod_mcore.ray_cluster.daemon_threads import call_in_thread, in_thread
from sod_mcore.serving.endpoints import FleetError
from sod_mcore.serving.fleet.children import GRACE_SECONDS, KILL_SECONDS, log_tail
from sod_mcore.serving.fleet.engine_actor import EngineActor, EngineOrder, StartedEngine
from sod_mcore.serving.fleet.launch import Address
from sod_mcore.serving.fleet.places import NotStartedError
from sod_mcore.serving.fleet.ray_room import Room

_ANSWER_SECONDS = 30.0
"""For calls that an actor answers at once."""

_AGAIN_SECONDS = 1.0
ROOM_SECONDS = 120.0
"""An actor with room has its place in a few seconds."""

MakeOrder = Callable[[Address | None], EngineOrder]
"""The order for an engine, whose last address it gets."""


class RayProcess:
    """An engine that an actor has started.

    Args:
        actor: it.
        started: what it said.
        log_path: of the engine.
    """

    def __init__(self, actor: Any, started: StartedEngine, log_path: Path) -> None:
        self.url = started.address.url
        self.is_lost = False
        self._actor = actor
        self._log_path = log_path
        self._log_start = started.log_start
        self._end: str | None = None
        self._waiting = asyncio.create_task(self._wait())

    @property
    def end(self) -> str | None:
        return self._end

    def log_tail(self, lines: int = 30) -> str:
        if not self._log_path.exists():
            return "(it is not here; the folder must be shared with the nodes: docs/ray.md)"
        return log_tail(self._log_path, self._log_start, lines)

    async def kill(self) -> bool:
        """End it; that of a lost actor is ended on its node, by its watchdog."""
        from ray.exceptions import RayError

        if self.is_lost:
            return True
        try:
            async with asyncio.timeout(KILL_SECONDS + _ANSWER_SECONDS):
                return bool(await self._actor.kill.remote())
        except (RayError, TimeoutError):
            self.is_lost = True
            return True

    async def _wait(self) -> None:
        from ray.exceptions import RayError

        try:
            self._end = f"ended with exit code {await self._actor.wait.remote()}"
        except RayError as error:
            self.is_lost = True
            self._end = f"is lost with its Ray actor: {one_line(error)}"


class RayPlace:
    """Room on some node.

    Args:
        room: what the engine has reserved.
        strategy: Ray's name for the reserved room.
        make_order: says what to start.
        taken: addresses of all engines of the fleet; this one's are added.
        room_seconds: longest wait for a node that has the room, where the last one is gone.
    """

    def __init__(
        self,
        room: Room,
        strategy: object,
        make_order: MakeOrder,
        taken: set[Address],
        room_seconds: float = ROOM_SECONDS,
    ) -> None:
        self._room = room
        self._strategy = strategy
        self._make_order = make_order
        self._taken = taken
        self._room_seconds = room_seconds
        self._actor: Any = None
        self._process: RayProcess | None = None
        self._last: Address | None = None
        self._has_started = False

    async def start(self, *, anew: bool) -> RayProcess:
        """On the last node and port, if they are there.

        Raises:
            NotStartedError: the actor, or its node, died meanwhile; or no node has room.
            FleetError: ``serving.python`` cannot be started there.
        """
        from ray.exceptions import RayError

        if self._process is not None and self._process.is_lost:
            self._discard()
        host = await self._wait_for_room()
        self._has_started = True
        try:
            order = self._make_order(None if anew else self._last)
            started = await self._actor.start.remote(order)
        except RayError as error:
            self._discard()
            raise NotStartedError(f"lost its Ray actor: {one_line(error)}") from error
        if isinstance(started, str):
            raise FleetError(f"on Ray node {host}: {started}")
        self._last = started.address
        self._taken.add(started.address)
        self._process = RayProcess(self._actor, started, order.log_path)
        return self._process

    async def stop(self) -> None:
        """End the engine in order, and the actor with it."""
        from ray.exceptions import RayError

        if self._actor is None:
            return
        if self._has_started:
            with contextlib.suppress(RayError, TimeoutError):
                async with asyncio.timeout(GRACE_SECONDS + _ANSWER_SECONDS):
                    await self._actor.stop.remote()
        self._discard()

    async def _wait_for_room(self) -> str:
        """The address of the actor's node; the actor stays in the queue where there is none yet."""
        from ray.exceptions import RayError

        lost = ""
        try:
            async with asyncio.timeout(self._room_seconds):
                while True:
                    try:
                        if self._actor is None:
                            self._actor = await in_thread(self._make_actor)
                        return str(await self._actor.host.remote())
                    except RayError as error:
                        # Ray sends actors to a node that has died until it has noticed that.
                        lost = f"; its Ray actor was lost: {one_line(error)}"
                        self._discard()
                    await asyncio.sleep(_AGAIN_SECONDS)
        except TimeoutError as error:
            raise NotStartedError(
                f"found no place within {self._room_seconds:g} s: it reserves {self._room} on one "
                f"node of the Ray cluster{lost}"
            ) from error

    def _make_actor(self) -> Any:
        import ray

        options = {
            "num_cpus": self._room.cpus,
            "num_gpus": self._room.gpus,
            "scheduling_strategy": self._strategy,
        }
        return ray.remote(EngineActor).options(**options).remote()

    def _discard(self) -> None:
        """Let the actor end, if it lives; does not wait for that."""
        import ray

        if self._actor is not None:
            call_in_thread(partial(ray.kill, self._actor), "ray-kill")
        self._actor, self._process, self._has_started = None, None, False
