"""Weights by value over HTTP, bucket by bucket; nothing is written to a disk.

The payload of a bucket is the pickle of ``[(name, CPU tensor), ...]``, in base64 inside JSON. The
pickle holds the values themselves. Torch's own way of sharing a tensor between processes, a file
descriptor, must never be sent: it ends SGLang's scheduler, which has another authentication key.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import orjson
import torch

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.endpoints import ModelEndpoints
from sod_mcore.serving.weights.receivers import Receiver, close_receivers, open_receivers
from sod_mcore.serving.weights.tensor_check import Bucket, checked_buckets, engine_shapes

CHUNK_BYTES = 3 << 20
"""Encoded at a time; divisible by 3, so that the pieces of base64 join without padding."""


@dataclass(frozen=True)
class TensorTransfer:
    """The whole model's tensors, in buckets.

    Attributes:
        buckets: consumed once, one at a time. While one is sent, its tensors and their pickle are
            in memory.
    """

    buckets: Iterable[Bucket]

    def check(self, endpoints: ModelEndpoints) -> None:
        """Refuse engines whose folder cannot be read; see :func:`engine_shapes`."""
        engine_shapes(endpoints)

    async def send(
        self, client: EngineClient, endpoints: ModelEndpoints, version: int, *, flush_cache: bool
    ) -> None:
        """Give each bucket to every engine before the next one is made.

        Raises:
            EngineError: an engine refused or did not answer; its weights are now of two versions.
            WeightUpdateError: a tensor does not fit the engine, or one is missing at the end.
        """
        receivers = await open_receivers(client, endpoints.engines)
        for bucket in checked_buckets(self.buckets, engine_shapes(endpoints)):
            await _send_to_all(client, receivers, _pickled(bucket))
        # An empty bucket closes the update: only now has an engine the whole of the new version.
        await _send_to_all(client, receivers, _pickled([]), version, flush_cache=flush_cache)
        await close_receivers(client, receivers)


async def _send_to_all(
    client: EngineClient,
    receivers: Sequence[Receiver],
    payload: bytes,
    version: int | None = None,
    *,
    flush_cache: bool = False,
) -> None:
    fields: dict[str, bool | str] = {"flush_cache": flush_cache}
    if version is not None:
        fields["weight_version"] = str(version)
    await asyncio.gather(
        *(
            client.post_stream(
                f"{receiver.url}/update_weights_from_tensor",
                _request_body(fields, payload, receiver.ranks),
            )
            for receiver in receivers
        )
    )


def _pickled(bucket: Bucket) -> bytes:
    return pickle.dumps([(name, _own_storage(tensor)) for name, tensor in bucket])


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU and alone in its storage: the pickle of a view is that of the whole storage."""
    tensor = tensor.detach().to("cpu").contiguous()
    is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if is_view else tensor


async def _request_body(
    fields: Mapping[str, bool | str], payload: bytes, copies: int
) -> AsyncIterator[bytes]:
    """The JSON document, piece by piece: the whole would be a third larger than the bucket."""
    yield orjson.dumps(fields).removesuffix(b"}") + b',"serialized_named_tensors":['
    view = memoryview(payload)
    for copy in range(copies):
        yield b',"' if copy else b'"'
        for start in range(0, len(view), CHUNK_BYTES):
            yield base64.b64encode(view[start : start + CHUNK_BYTES])
        yield b'"'
    yield b"]}"
