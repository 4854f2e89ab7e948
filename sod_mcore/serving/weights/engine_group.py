"""The process group of rank 0 and all ranks of a model's engines, which carries their weights.

An engine takes part in a collective operation while it answers a request, so every step here is
both at once: requests to all engines, and rank 0's part in a thread. Whatever goes wrong ends in a
bounded time in one error that names one engine: the one that is gone or gives no answer, if there
is one, for the others only notice it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from sod_mcore.platform.outside_group import BackendName, OutsideGroup, address_towards
from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.weights.receivers import Receiver
from sod_mcore.serving.weights.tensor_check import Bucket
from sod_mcore.serving.weights.transfer import WeightUpdateError

JOIN_SECONDS = 60.0
"""Longest wait until all engines are in a group; they stand still and have nothing else to do."""
GRACE_SECONDS = 10.0
"""Longest wait for answers once an operation has failed; an engine that is well gives them at
once."""


@dataclass(frozen=True)
class EngineGroup:
    """A group that all engines of one model have joined.

    Attributes:
        receivers: the engines, in the order of their ranks.
        outside: rank 0's side.
        grace_seconds: longest wait for answers once an operation has failed and rank 0 has left.
    """

    receivers: tuple[Receiver, ...]
    outside: OutsideGroup
    grace_seconds: float

    @classmethod
    async def form(
        cls,
        client: EngineClient,
        receivers: tuple[Receiver, ...],
        backend: BackendName,
        timeout_seconds: float,
    ) -> EngineGroup:
        """Let every engine join a new group.

        Args:
            timeout_seconds: longest wait for one broadcast; also for the engines to join and for
                their last answers, where it is shorter than JOIN_SECONDS and GRACE_SECONDS.

        Raises:
            EngineError: one of them did not join.
            WeightUpdateError: they cannot be in one group.
        """
        offsets = rank_offsets(receivers)
        outside = OutsideGroup(
            name=f"sod_mcore_{uuid.uuid4().hex}",
            address=_address_towards(receivers),
            world_size=offsets[-1],
            backend=backend,
            join_seconds=min(timeout_seconds, JOIN_SECONDS),
            broadcast_seconds=timeout_seconds,
        )
        group = cls(receivers, outside, min(timeout_seconds, GRACE_SECONDS))
        common = {
            "master_address": outside.address,
            "master_port": outside.port,
            "world_size": outside.world_size,
            "group_name": outside.name,
            "backend": backend,
        }
        requests = [{**common, "rank_offset": offset} for offset in offsets[:-1]]
        await group._together(client, "init_weights_update_group", requests, outside.join)
        return group

    async def broadcast(
        self,
        client: EngineClient,
        bucket: Bucket,
        version: int | None = None,
        *,
        flush_cache: bool = False,
    ) -> None:
        """Load tensors into every engine; with ``version``, they report it from then on.

        Raises:
            EngineError: an engine did not take them; the group is dissolved.
        """
        tensors = [self._ready(tensor) for _, tensor in bucket]
        request: dict[str, Any] = {
            **_description(bucket, self.outside.name),
            "flush_cache": flush_cache,
        }
        if version is not None:
            request["weight_version"] = str(version)
        await self._together(
            client,
            "update_weights_from_distributed",
            [request] * len(self.receivers),
            lambda: self.outside.broadcast(tensors),
        )

    async def has_all_members(self, client: EngineClient) -> bool:
        """Whether every engine is still in the group: one that was started again is not.

        Each is asked to take no tensor, which SGLang 0.5.21 and later refuse without the group;
        earlier versions end with an exception, and must not be asked.
        """
        if not all(receiver.has_session for receiver in self.receivers):
            return False
        request = {**_description([], self.outside.name), "flush_cache": False}
        try:
            await asyncio.gather(
                *(
                    client.post(f"{receiver.url}/update_weights_from_distributed", request)
                    for receiver in self.receivers
                )
            )
        except EngineError:
            return False
        return True

    async def dissolve(self, client: EngineClient) -> None:
        """Leave the group, and let every engine that answers leave it, unless that is done."""
        if not self.outside.is_open:
            return
        self.outside.leave()
        request = {"group_name": self.outside.name}
        with suppress(TimeoutError):
            async with asyncio.timeout(self.grace_seconds):
                # Whatever they answer: an engine that is gone, or never joined, has none to leave.
                await asyncio.gather(
                    *(
                        client.post(f"{receiver.url}/destroy_weights_update_group", request)
                        for receiver in self.receivers
                    ),
                    return_exceptions=True,
                )

    def _ready(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        return (tensor.cpu() if self.outside.backend == "gloo" else tensor).contiguous()

    async def _together(
        self,
        client: EngineClient,
        endpoint: str,
        requests: Sequence[Mapping[str, Any]],
        work: Callable[[], None],
    ) -> None:
        """POST a request to each engine, and do rank 0's part meanwhile.

        Raises:
            EngineError: an engine failed; the group is dissolved.
            WeightUpdateError: rank 0 alone did; the group is dissolved.
        """
        posts = [
            asyncio.create_task(client.post(f"{receiver.url}/{endpoint}", dict(request)))
            for receiver, request in zip(self.receivers, requests, strict=True)
        ]
        ours = asyncio.create_task(asyncio.to_thread(work))
        await asyncio.wait([ours, *posts], return_when=asyncio.FIRST_EXCEPTION)
        if all(task.done() and task.exception() is None for task in (ours, *posts)):
            return
        await asyncio.wait([ours])  # a thread cannot be cancelled; its own timeouts end it
        failed_early = [task.done() and task.exception() is not None for task in posts]
        # Engines that wait for rank 0, or for each other, are released by this.
        dissolving = asyncio.create_task(self.dissolve(client))
        await asyncio.wait([dissolving, *posts], timeout=self.grace_seconds)
        for task in (dissolving, *posts):
            task.cancel()
        answers = await asyncio.gather(*posts, return_exceptions=True)
        raise self._blame(endpoint, answers, failed_early, ours.exception())

    def _blame(
        self,
        endpoint: str,
        answers: Sequence[object],
        failed_early: Sequence[bool],
        our_error: BaseException | None,
    ) -> Exception:
        """What to tell of a failed operation: first of an engine that is gone, then of one that
        gives no answer, then of the one that failed first, then of those that only noticed."""
        gone: list[Exception] = []
        silent: list[Exception] = []
        refused: list[Exception] = []
        noticed: list[Exception] = []
        for receiver, answer, is_early in zip(self.receivers, answers, failed_early, strict=True):
            if isinstance(answer, asyncio.CancelledError):
                reason = f" ({our_error})" if our_error is not None else ""
                message = f"{receiver.url}/{endpoint}: no answer{reason}"
                silent.append(EngineError(message, retryable=True))
            elif isinstance(answer, EngineError):
                kind = gone if answer.status is None else refused if is_early else noticed
                kind.append(answer)
        ours = WeightUpdateError(f"{endpoint}: rank 0 failed: {our_error}")
        return [*gone, *silent, *refused, *noticed, ours][0]


def rank_offsets(receivers: Sequence[Receiver]) -> list[int]:
    """The first rank of each engine, after rank 0, and last the number of all ranks.

    Raises:
        WeightUpdateError: an engine is pipeline-parallel; SGLang 0.5.23 counts only its
            tensor-parallel ranks, so that those of several stages would be the same.
    """
    for receiver in receivers:
        if receiver.pipeline_stages > 1:
            raise WeightUpdateError(
                f"{receiver.url} has {receiver.pipeline_stages} pipeline stages, which "
                "serving.weight_sync=distributed cannot reach; set it to disk"
            )
    return list(accumulate((receiver.ranks for receiver in receivers), initial=1))


def _address_towards(receivers: Sequence[Receiver]) -> str:
    try:
        return address_towards([receiver.url for receiver in receivers])
    except OSError as error:
        raise WeightUpdateError(f"there is no way to the engines from here: {error}") from error


def _description(bucket: Bucket, group_name: str) -> dict[str, Any]:
    """What an engine has to know to receive tensors."""
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "group_name": group_name,
    }
