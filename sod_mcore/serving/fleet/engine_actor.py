"""What runs inside a Ray actor: one engine on the actor's node, which ends with the actor.

Nothing here knows Ray but for the node's address: the class becomes an actor where it is started
(``ray_place.py``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sod_mcore.config import EngineConfig, ServingConfig
from sod_mcore.serving.fleet import launch
from sod_mcore.serving.fleet.children import Child, Children
from sod_mcore.serving.fleet.launch import Address, EnginePlace
from sod_mcore.serving.fleet.model_folder import ModelFolder

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class EngineOrder:
    """An engine to be started; paths hold on every node.

    Attributes:
        last: the address that it had, which it keeps where that can be had; None for another one.
        avoid: addresses that engines of this fleet have, or had: who looks for one there must not
            find another.
    """

    serving: ServingConfig
    engine: EngineConfig
    folder: ModelFolder
    place: EnginePlace
    log_path: Path
    last: Address | None
    avoid: frozenset[Address]


@dataclass(frozen=True)
class StartedEngine:
    """A process on the actor's node.

    Attributes:
        address: it listens there, or will.
        log_start: size of its log before it.
    """

    address: Address
    log_start: int


class EngineActor:
    """Keeps one engine process at a time; its methods run one at a time, between two awaits."""

    def __init__(self) -> None:
        self._children = Children(is_actor=True)
        self._child: Child | None = None

    async def host(self) -> str:
        """The node's address; the first call, which is answered when the actor has a place."""
        import ray

        return str(ray.util.get_node_ip_address())

    async def start(self, order: EngineOrder) -> StartedEngine | str:
        """Start the engine; returns what keeps it from starting, in words for the user.

        The one before must have ended.
        """
        address = choose_address(await self.host(), order.last, order.avoid)
        command = launch.engine_command(
            order.serving, order.engine, order.folder, order.place, address
        )
        try:
            self._child = self._children.start(
                f"{order.place.name} engine {order.place.index}",
                command,
                environment=launch.engine_environment(
                    order.serving, order.engine, order.place, without_ray(os.environ)
                ),
                log_path=order.log_path,
            )
        except OSError as error:
            return launch.cannot_be_started(command[0], order.log_path, error)
        return StartedEngine(address, self._child.log_start)

    async def wait(self) -> int:
        """Wait for the engine's end; returns its exit code, negative for a signal."""
        child = self._running
        while (code := child.exit_code) is None:
            await asyncio.sleep(_POLL_SECONDS)
        return code

    async def kill(self) -> bool:
        """End what is left of the engine; returns whether all of it is gone."""
        return await asyncio.to_thread(self._children.kill, self._running)

    async def stop(self) -> None:
        """End the engine in order."""
        await asyncio.to_thread(self._children.stop)

    @property
    def _running(self) -> Child:
        assert self._child is not None, "start() comes first"
        return self._child


def choose_address(host: str, last: Address | None, avoid: frozenset[Address]) -> Address:
    """An address on this node: the last one, or one that no engine of the fleet ever had."""
    if last is not None and last.host == host and launch.is_free_port(host, last.port):
        return last
    while (address := Address(host, launch.free_port(host))) in avoid:
        pass
    return address


def without_ray(environment: Mapping[str, str]) -> dict[str, str]:
    """The same without what Ray has said to its own processes, its token above all."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith("RAY_") and name != "PYTHONBREAKPOINT"
    }
