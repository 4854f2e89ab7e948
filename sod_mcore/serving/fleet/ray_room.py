"""What engines reserve on a Ray cluster, and whether it can ever have room for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sod_mcore.config import ConfigError, EngineConfig, ServingConfig, serving_field
from sod_mcore.ray_cluster.settings import check_address, check_installed
from sod_mcore.serving.fleet import launch
from sod_mcore.serving.fleet.launch import Device


@dataclass(frozen=True)
class Room:
    """GPUs and CPUs: of an engine, which has them on one node, or of a node or a cluster."""

    gpus: float = 0.0
    cpus: float = 0.0

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Room:
        """From Ray's names for them."""
        return cls(resources.get("GPU", 0.0), resources.get("CPU", 0.0))

    @property
    def resources(self) -> dict[str, float]:
        """In Ray's names, without what is zero."""
        named = {"GPU": float(self.gpus), "CPU": float(self.cpus)}
        return {name: amount for name, amount in named.items() if amount}

    def __add__(self, other: Room) -> Room:
        return Room(self.gpus + other.gpus, self.cpus + other.cpus)

    def __str__(self) -> str:
        return f"{_count(self.gpus, 'GPU')} and {_count(self.cpus, 'CPU')}"

    def holds(self, other: Room) -> bool:
        """Whether ``other`` is no more than this."""
        return other.gpus <= self.gpus and other.cpus <= self.cpus


@dataclass(frozen=True)
class Node:
    """A node of the cluster that lives.

    Attributes:
        host: its address.
        room: all that it has, taken or not.
    """

    host: str
    room: Room


def check_engines_on(serving: ServingConfig) -> None:
    """Find what is wrong with the settings of where engines are started, and on which GPUs.

    Raises:
        ConfigError: one line, whatever it is.
    """
    is_on_ray = serving.engines_on == "ray"
    if not is_on_ray and serving.ray_address != "auto":
        raise ConfigError(
            f"serving.ray_address is {serving.ray_address}, but serving.engines_on is local; set "
            "that to ray, or leave the address out"
        )
    for name, engine in serving.models.items():
        launch.check_gpus(serving_field(name), engine)
        _check_engine(serving_field(name), engine, is_on_ray)
    if is_on_ray:
        check_installed("serving.engines_on", "serving.engines_on=local")
        check_address("serving.ray_address", serving.ray_address, "or auto")


def _check_engine(field: str, engine: EngineConfig, is_on_ray: bool) -> None:
    if is_on_ray and engine.gpus:
        raise ConfigError(
            f"{field}.gpus is {list(engine.gpus)}, but with serving.engines_on=ray it is Ray that "
            f"chooses GPUs; say in {field}.ray_gpus how many each engine gets"
        )
    for name in ("ray_gpus", "ray_cpus"):
        value = getattr(engine, name)
        if not is_on_ray and value is not None:
            raise ConfigError(
                f"{field}.{name} is {value:g}, but serving.engines_on is local; set that to ray, "
                f"or leave {name} out"
            )


def engine_room(field: str, engine: EngineConfig, device: Device) -> Room:
    """What each engine of a model reserves; ``field`` is the section.

    Raises:
        ConfigError: GPUs are reserved for engines that use none.
    """
    if device == "cuda":
        return Room(launch.num_gpus(engine, 0), engine.ray_cpus or 1.0)
    if engine.ray_gpus:
        raise ConfigError(
            f"{field}.ray_gpus is {engine.ray_gpus}, but the engines run on CPUs (serving.device "
            "is cpu, or auto on a Ray cluster without GPUs); leave it out, or add nodes with GPUs"
        )
    return Room(0, engine.ray_cpus or float(engine.threads))


def check_room(asked: Mapping[str, tuple[int, Room]], nodes: Iterable[Node]) -> None:
    """Refuse what the cluster could not hold if it were empty.

    Args:
        asked: for each model that is started the number of its engines, and what each reserves.
        nodes: of the cluster.

    Raises:
        ConfigError: a line that names what is asked for and what is there.
    """
    nodes = list(nodes)
    there = ", ".join(f"{node.host}: {node.room}" for node in nodes)
    for name, (_, room) in asked.items():
        if not any(node.room.holds(room) for node in nodes):
            field = serving_field(name)
            raise ConfigError(
                f"each engine of {name} reserves {room} on one node ({field}.ray_gpus, "
                f"{field}.ray_cpus), and no node of the Ray cluster has that ({there}); lower "
                "them, or add a node"
            )
    total = sum((node.room for node in nodes), Room())
    if not total.holds(total_room(asked)):
        raise ConfigError(
            f"the engines reserve {describe(asked)}, and the Ray cluster has {total} ({there}); "
            "have fewer engines, lower what they reserve, or add nodes"
        )


def total_room(asked: Mapping[str, tuple[int, Room]]) -> Room:
    """What all engines reserve together."""
    each = [room for number, room in asked.values() for _ in range(number)]
    return sum(each, Room())


def describe(asked: Mapping[str, tuple[int, Room]]) -> str:
    """All that is asked for, in words."""
    parts = [f"{name}: {number} x {room}" for name, (number, room) in asked.items()]
    return f"{total_room(asked)} ({'; '.join(parts)})"


def _count(amount: float, unit: str) -> str:
    return f"{amount:g} {unit}{'' if amount == 1 else 's'}"
