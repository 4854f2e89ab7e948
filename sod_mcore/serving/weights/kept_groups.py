"""Keeps the process group of each model's engines from one weight update to the next.

An update that fails may leave engines out of the group, and an engine that was started again is in
none: then the next update makes a new group, under another name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import torch

from sod_mcore.platform.outside_group import BackendName
from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.endpoints import Endpoints
from sod_mcore.serving.weights.engine_group import EngineGroup
from sod_mcore.serving.weights.receivers import Receiver


class KeptGroups:
    """The groups that are open, by model.

    Args:
        endpoints: the fleet.
        device: where the trainer's tensors are.
        timeout_seconds: longest wait for one broadcast.
    """

    def __init__(self, endpoints: Endpoints, device: torch.device, timeout_seconds: float) -> None:
        self._endpoints = endpoints
        self._device = device
        self._timeout_seconds = timeout_seconds
        self._kept: dict[str, EngineGroup] = {}

    @property
    def names(self) -> dict[str, str]:
        """The name of each model's group, as its engines know it."""
        return {model: group.outside.name for model, group in self._kept.items()}

    @asynccontextmanager
    async def group(
        self, client: EngineClient, model: str, receivers: tuple[Receiver, ...]
    ) -> AsyncIterator[EngineGroup]:
        """The group of a model's engines: that of the last update if that ended well and all of
        them are still in it, or else a new one.

        Raises:
            EngineError: an engine did not join.
            WeightUpdateError: they cannot be in one group.
        """
        group = await self._intact(client, model, receivers)
        if group is None:
            backend = self._backend(receivers)
            group = await EngineGroup.form(client, receivers, backend, self._timeout_seconds)
        try:
            yield group
        except BaseException:
            await group.dissolve(client)
            raise
        self._kept[model] = group

    def close(self) -> None:
        """Dissolve all groups."""

        async def dissolve_all() -> None:
            async with EngineClient(self._endpoints, keep_alive=False) as client:
                await asyncio.gather(*(group.dissolve(client) for group in self._kept.values()))

        if self._kept:
            asyncio.run(dissolve_all())
            self._kept.clear()

    async def _intact(
        self, client: EngineClient, model: str, receivers: tuple[Receiver, ...]
    ) -> EngineGroup | None:
        group = self._kept.pop(model, None)
        if group is None:
            return None
        if group.receivers == receivers and await group.has_all_members(client):
            return group
        await group.dissolve(client)
        return None

    def _backend(self, receivers: Sequence[Receiver]) -> BackendName:
        """NCCL where both sides have GPUs; gloo takes tensors from and to any device."""
        devices = {self._device.type, *(receiver.device for receiver in receivers)}
        return "nccl" if devices == {"cuda"} else "gloo"
