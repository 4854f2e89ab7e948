"""A Ray cluster as the fleet sees it: joined, with room reserved for every engine, and watched."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sod_mcore.config import EngineConfig, ServingConfig, serving_field
from sod_mcore.ray_cluster.connection import JoinedRay, LostClusterError, joined_ray
from sod_mcore.ray_cluster.daemon_threads import in_thread
from sod_mcore.serving.endpoints import FleetError
from sod_mcore.serving.fleet.engine_actor import EngineOrder
from sod_mcore.serving.fleet.launch import Address, Device, EnginePlace
from sod_mcore.serving.fleet.model_folder import ModelFolder
from sod_mcore.serving.fleet.ray_place import RayPlace
from sod_mcore.serving.fleet.ray_room import Node, Room, check_room, describe, engine_room

RESERVE_SECONDS = 30.0
"""Until Ray has reserved room that is free; what another run has just left may take a while."""
_WATCH_SECONDS = 1.0
_RELEASE_SECONDS = 5.0


class RayNodes:
    """The nodes, and what is reserved on them.

    Args:
        serving: the engines.
    """

    def __init__(self, serving: ServingConfig) -> None:
        self._serving = serving
        self._engines = {n: e for n, e in serving.models.items() if not e.addresses}
        self._stack = ExitStack()
        self._joined = JoinedRay()
        self._group: Any = None
        self._asked: dict[str, tuple[int, Room]] = {}
        self._places: list[RayPlace] = []
        self._taken: set[Address] = set()

    async def reserve(self) -> Device:
        """Join the cluster and reserve room for all engines, or for none; returns what they run on.

        Raises:
            ConfigError: the cluster cannot be joined, or is too small.
            FleetError: others have taken the room.
        """
        self._joined = await in_thread(
            lambda: self._stack.enter_context(
                joined_ray("serving.ray_address", self._serving.ray_address)
            )
        )
        nodes = await in_thread(_nodes)
        device = self._device(nodes)
        self._asked = {
            name: (engine.engines, engine_room(serving_field(name), engine, device))
            for name, engine in self._engines.items()
        }
        check_room(self._asked, nodes)
        if self._asked and not await in_thread(self._reserve_all):
            free = Room.of(await in_thread(_free_resources))
            raise FleetError(
                f"the engines reserve {describe(self._asked)}, and the Ray cluster could not give "
                f"them that within {RESERVE_SECONDS:g} s, each engine's on one node: {free} of it "
                f"are free ({', '.join(f'{node.host} has {node.room}' for node in nodes)}); stop "
                "what has the rest, have fewer engines, or add nodes"
            )
        return device

    def place(
        self, engine: EngineConfig, folder: ModelFolder, place: EnginePlace, log_path: Path
    ) -> RayPlace:
        """The room of one engine."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        order = EngineOrder(
            dataclasses.replace(self._serving, python=_anywhere(self._serving.python)),
            dataclasses.replace(engine, model_path=str(Path(engine.model_path).absolute())),
            folder,
            place,
            log_path.absolute(),
            last=None,
            avoid=frozenset(),
        )

        def make_order(last: Address | None) -> EngineOrder:
            return dataclasses.replace(order, last=last, avoid=frozenset(self._taken))

        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group,
            placement_group_bundle_index=self._bundle(place),
        )
        _, room = self._asked[place.name]
        made = RayPlace(room, strategy, make_order, self._taken)
        self._places.append(made)
        return made

    async def watch(self) -> None:
        """Look whether the cluster is there; never returns.

        Raises:
            FleetError: it is gone.
        """
        while True:
            try:
                await in_thread(self._joined.check)
            except LostClusterError as error:
                raise FleetError(f"{error}; its engines end with it") from error
            await asyncio.sleep(_WATCH_SECONDS)

    async def close(self) -> None:
        """End every engine, give the room back and leave the cluster."""
        if not self._joined.is_lost:
            await asyncio.gather(*(place.stop() for place in self._places))
            if self._group is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RELEASE_SECONDS):
                        await in_thread(self._release)
        await in_thread(self._stack.close)

    def _device(self, nodes: list[Node]) -> Device:
        if self._serving.device != "auto":
            return self._serving.device
        return "cuda" if any(node.room.gpus for node in nodes) else "cpu"

    def _reserve_all(self) -> bool:
        from ray.util import placement_group

        rooms = [room.resources for number, room in self._asked.values() for _ in range(number)]
        self._group = placement_group(rooms, strategy="SPREAD")
        return bool(self._group.wait(RESERVE_SECONDS))

    def _release(self) -> None:
        from ray.util import remove_placement_group

        remove_placement_group(self._group)

    def _bundle(self, place: EnginePlace) -> int:
        names = list(self._asked)
        before = names[: names.index(place.name)]
        return sum(self._asked[name][0] for name in before) + place.index


def _nodes() -> list[Node]:
    import ray

    return [
        Node(node["NodeManagerAddress"], Room.of(node["Resources"]))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _free_resources() -> dict[str, float]:
    import ray

    return dict(ray.available_resources())


def _anywhere(program: str) -> str:
    """A program for a process with another working folder; a name without one is looked up."""
    return str(Path(program).absolute()) if os.sep in program else program
