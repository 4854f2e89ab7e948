"""The ranks of one scripted engine in a trainer's process group, each with torch's own gloo.

They look for the trainer under SGLang's keys. That these are SGLang's is shown with real engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=30)
Tensors = list[tuple[str, torch.Tensor]]


class ScriptedRanks:
    """Tensor-parallel ranks of an engine.

    Attributes:
        ranks: their numbers in the group that was joined last.
        broken_off: why a broadcast ended early, in the engine's eyes.
    """

    def __init__(self) -> None:
        self.ranks: list[int] = []
        self.broken_off: list[str] = []
        self._groups: dict[str, list[Any]] = {}

    async def join(self, request: Mapping[str, Any], size: int) -> str | None:
        """Join a group with every rank; why it failed, if it did."""
        self.ranks = [request["rank_offset"] + rank for rank in range(size)]
        joins = (asyncio.to_thread(_join, request, rank) for rank in self.ranks)
        groups = await asyncio.gather(*joins, return_exceptions=True)
        for group in groups:
            if isinstance(group, BaseException):
                return f"Failed to initialize custom process group: {group}"
        self._groups[request["group_name"]] = groups
        return None

    async def receive(self, request: Mapping[str, Any]) -> tuple[Tensors, ...] | str:
        """What each rank got; or why it got nothing."""
        name = request["group_name"]
        if name not in self._groups:
            return f"Failed to receive weights: Group {name} not in {list(self._groups)}"
        receives = (asyncio.to_thread(_receive, group, request) for group in self._groups[name])
        received = await asyncio.gather(*receives, return_exceptions=True)
        for tensors in received:
            if isinstance(tensors, BaseException):
                self.broken_off.append(str(tensors))
                return f"Failed to receive weights: {tensors}"
        return tuple(received)  # type: ignore[arg-type]

    def leave(self, name: str) -> bool:
        """Close a group's connections; whether there was such a group."""
        return self._groups.pop(name, None) is not None

    def die(self) -> None:
        """Close everything, as the end of the process does."""
        self._groups.clear()

    @property
    def open_groups(self) -> int:
        """Groups that have not been left."""
        return len(self._groups)


def _join(request: Mapping[str, Any], rank: int) -> Any:
    name, size = request["group_name"], request["world_size"]
    assert request["backend"] == "gloo"
    server = dist.TCPStore(request["master_address"], request["master_port"], size, timeout=TIMEOUT)
    by_name = dist.PrefixStore(f"{name}/", dist.PrefixStore(name, server))
    return dist.ProcessGroupGloo(dist.PrefixStore("cpu/", by_name), rank, size, timeout=TIMEOUT)


def _receive(group: Any, request: Mapping[str, Any]) -> Tensors:
    tensors = []
    for name, dtype, shape in zip(
        request["names"], request["dtypes"], request["shapes"], strict=True
    ):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        group.broadcast(tensor, 0, TIMEOUT).wait()
        tensors.append((name, tensor))
    return tensors
