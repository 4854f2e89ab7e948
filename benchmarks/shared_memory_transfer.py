"""A way of weights that was measured and not taken: handles of torch's shared memory over HTTP.

docs/weight_sync.md says why. It stays here so that its numbers can be had again.
"""

from __future__ import annotations

import asyncio
import base64
import io
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import torch.multiprocessing

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.endpoints import ModelEndpoints
from sod_mcore.serving.weights.receivers import Receiver, close_receivers, open_receivers
from sod_mcore.serving.weights.tensor_check import Bucket, checked_buckets, engine_shapes


@dataclass(frozen=True)
class SharedMemoryTransfer:
    """The whole model's tensors, in buckets, to engines on this machine."""

    buckets: Iterable[Bucket]

    def check(self, endpoints: ModelEndpoints) -> None:
        """Refuse engines whose folder cannot be read."""
        engine_shapes(endpoints)

    async def send(
        self, client: EngineClient, endpoints: ModelEndpoints, version: int, *, flush_cache: bool
    ) -> None:
        """Give each bucket to every engine before the next one is made."""
        receivers = await open_receivers(client, endpoints.engines)
        last: dict[str, bool | str] = {"flush_cache": flush_cache, "weight_version": str(version)}
        with _file_system_sharing():
            for bucket in checked_buckets(self.buckets, engine_shapes(endpoints)):
                await _send_to_all(client, receivers, bucket, {"flush_cache": False})
            await _send_to_all(client, receivers, [], last)
        await close_receivers(client, receivers)


async def _send_to_all(
    client: EngineClient,
    receivers: Iterable[Receiver],
    bucket: Bucket,
    fields: dict[str, bool | str],
) -> None:
    shared = [(name, tensor.detach().cpu().contiguous().share_memory_()) for name, tensor in bucket]
    await asyncio.gather(
        *(
            client.post(
                f"{receiver.url}/update_weights_from_tensor",
                # A handle of its own for each reader: reading one frees it.
                {
                    **fields,
                    "serialized_named_tensors": [_handles(shared) for _ in range(receiver.ranks)],
                },
            )
            for receiver in receivers
        )
    )


def _handles(bucket: Bucket) -> str:
    buffer = io.BytesIO()
    ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(list(bucket))
    return base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def _file_system_sharing() -> Iterator[None]:
    """By names of files in /dev/shm; torch's default, file descriptors, would end the engine."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
