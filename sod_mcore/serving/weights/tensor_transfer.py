"""Weights as tensors over HTTP, bucket by bucket; nothing is written to a disk.

The payload of a bucket is the pickle of ``[(name, tensor), ...]``, in base64 inside JSON. What
stands in it for a tensor is a :class:`TensorEncoding`: its values here, or a handle of CUDA memory
(``cuda_handles``). Torch's own way of sharing a CPU tensor between processes, a file descriptor,
must never be sent: it ends SGLang's scheduler, which has another authentication key.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import orjson
import torch

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.endpoints import ModelEndpoints
from sod_mcore.serving.weights.receivers import Receiver, close_receivers, open_receivers
from sod_mcore.serving.weights.tensor_check import Bucket, checked_buckets, engine_shapes

CHUNK_BYTES = 3 << 20
"""Encoded at a time; divisible by 3, so that the pieces of base64 join without padding."""

_Fields = Mapping[str, bool | str]


class TensorEncoding(Protocol):
    """What stands for the tensors of a bucket in a request.

    Attributes:
        load_format: SGLang's name for it; None for a list of tensors.
    """

    load_format: str | None

    def check(self, receivers: Sequence[Receiver]) -> None:
        """Refuse engines that cannot read it.

        Raises:
            WeightUpdateError: names the engine, and the mend.
        """

    def payloads(self, bucket: Bucket, readers: int) -> Sequence[bytes]:
        """A pickle of the bucket for each of so many readers: every rank of every engine.

        Raises:
            WeightUpdateError: it cannot be made.
        """

    def release(self) -> None:
        """Let go of the bucket: each reader has answered, or the update has failed."""


class ByValue:
    """The numbers themselves, so that a reader may be anywhere."""

    load_format: str | None = None

    def check(self, receivers: Sequence[Receiver]) -> None:
        """Every engine reads numbers."""

    def payloads(self, bucket: Bucket, readers: int) -> Sequence[bytes]:
        """One pickle, for all of them."""
        named_tensors = [(name, _own_storage(tensor)) for name, tensor in bucket]
        return [pickle.dumps(named_tensors)] * readers

    def release(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class TensorTransfer:
    """The whole model's tensors, in buckets.

    Attributes:
        buckets: consumed once, one at a time. While one is sent, its tensors and their payloads are
            in memory.
        encoding: what is sent in the place of a tensor.
    """

    buckets: Iterable[Bucket]
    encoding: TensorEncoding = field(default_factory=ByValue)

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
        self.encoding.check(receivers)
        for bucket in checked_buckets(self.buckets, engine_shapes(endpoints)):
            await self._send_bucket(client, receivers, bucket)
        # An empty bucket closes the update: only now has an engine the whole of the new version.
        last: _Fields = {"flush_cache": flush_cache, "weight_version": str(version)}
        nothing = [pickle.dumps([])] * _number_of_ranks(receivers)
        await _post_payloads(client, receivers, last, nothing)
        await close_receivers(client, receivers)

    async def _send_bucket(
        self, client: EngineClient, receivers: Sequence[Receiver], bucket: Bucket
    ) -> None:
        fields: dict[str, bool | str] = {"flush_cache": False}
        if self.encoding.load_format is not None:
            fields["load_format"] = self.encoding.load_format
        try:
            payloads = self.encoding.payloads(bucket, _number_of_ranks(receivers))
            await _post_payloads(client, receivers, fields, payloads)
        finally:
            self.encoding.release()


async def _post_payloads(
    client: EngineClient,
    receivers: Sequence[Receiver],
    fields: _Fields,
    payloads: Sequence[bytes],
) -> None:
    """Give every engine the payloads of its ranks, all at once."""
    rest = iter(payloads)
    await asyncio.gather(
        *(
            client.post_stream(
                f"{receiver.url}/update_weights_from_tensor",
                _request_body(fields, list(islice(rest, receiver.ranks))),
            )
            for receiver in receivers
        )
    )


def _number_of_ranks(receivers: Sequence[Receiver]) -> int:
    return sum(receiver.ranks for receiver in receivers)


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU and alone in its storage: the pickle of a view is that of the whole storage."""
    tensor = tensor.detach().to("cpu").contiguous()
    is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if is_view else tensor


async def _request_body(fields: _Fields, payloads: Sequence[bytes]) -> AsyncIterator[bytes]:
    """The JSON document, piece by piece: the whole would be a third larger than the bucket."""
    yield orjson.dumps(fields).removesuffix(b"}") + b',"serialized_named_tensors":['
    for number, payload in enumerate(payloads):
        yield b',"' if number else b'"'
        view = memoryview(payload)
        for start in range(0, len(view), CHUNK_BYTES):
            yield base64.b64encode(view[start : start + CHUNK_BYTES])
        yield b'"'
    yield b"]}"
