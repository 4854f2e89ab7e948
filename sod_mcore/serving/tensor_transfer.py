"""Weights by value over HTTP, bucket by bucket; nothing is written to a disk.

The payload of a bucket is the pickle of ``[(name, CPU tensor), ...]``, in base64 inside JSON. The
pickle holds the values themselves. Torch's own way of sharing a tensor between processes, a file
descriptor, must never be sent: it ends SGLang's scheduler, which has another authentication key.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

import orjson
import torch

from sod_mcore.serving.client import EngineClient
from sod_mcore.serving.fleet import ModelEndpoints
from sod_mcore.serving.json_http import EngineError
from sod_mcore.serving.tensor_check import Bucket, engine_shapes, require_loadable
from sod_mcore.serving.weight_transfer import WeightUpdateError, post_to_all

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

    async def send(self, client: EngineClient, endpoints: ModelEndpoints, version: int) -> None:
        """Give each bucket to every engine before the next one is made.

        Raises:
            EngineError: an engine refused or did not answer; its weights are now of two versions.
            WeightUpdateError: a tensor does not fit the engine, or one is missing at the end.
        """
        receivers = [await _open_receiver(client, url) for url in endpoints.engines]
        shapes = engine_shapes(endpoints)
        missing = set(shapes)
        for bucket in self.buckets:
            require_loadable(bucket, shapes)
            missing -= {name for name, _ in bucket}
            await _send_to_all(client, receivers, _pickled(bucket))
        if missing:
            raise WeightUpdateError(
                f"{len(missing)} of the engine's weights were not sent, {min(missing)!r} among them"
            )
        # An empty bucket closes the update: only now has an engine the whole of the new version.
        await _send_to_all(client, receivers, _pickled([]), version)
        with_session = [receiver.url for receiver in receivers if receiver.has_session]
        await post_to_all(client, with_session, "end_weight_update", {})


@dataclass(frozen=True)
class _Receiver:
    """An engine that takes tensors.

    Attributes:
        copies: tensor-parallel size; each rank of the engine reads an entry of its own.
        has_session: whether this version of SGLang wants to be told where an update ends.
    """

    url: str
    copies: int
    has_session: bool


async def _open_receiver(client: EngineClient, url: str) -> _Receiver:
    copies = int((await client.get(f"{url}/server_info")).get("tp_size", 1))
    return _Receiver(url, copies, await _begin_session(client, url))


async def _begin_session(client: EngineClient, url: str) -> bool:
    """Open the session that SGLang 0.5.21 and later demand; False where there is none."""
    try:
        await client.post(f"{url}/begin_weight_update", {})
    except EngineError as error:
        if error.status == 404:
            return False
        if error.status != 400:
            raise
        # An update that broke off has left its session open.
        await client.post(f"{url}/end_weight_update", {})
        await client.post(f"{url}/begin_weight_update", {})
    return True


async def _send_to_all(
    client: EngineClient, receivers: Sequence[_Receiver], payload: bytes, version: int | None = None
) -> None:
    await asyncio.gather(
        *(
            client.post_stream(
                f"{receiver.url}/update_weights_from_tensor",
                _request_body(payload, receiver.copies, version),
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


async def _request_body(payload: bytes, copies: int, version: int | None) -> AsyncIterator[bytes]:
    """The JSON document, piece by piece: in one piece it would be a third larger than the bucket.

    The cache is emptied once, at the end, when the version is given.
    """
    fields: dict[str, bool | str] = {"flush_cache": version is not None}
    if version is not None:
        fields["weight_version"] = str(version)
    yield orjson.dumps(fields).removesuffix(b"}") + b',"serialized_named_tensors":['
    view = memoryview(payload)
    for copy in range(copies):
        yield b',"' if copy else b'"'
        for start in range(0, len(view), CHUNK_BYTES):
            yield base64.b64encode(view[start : start + CHUNK_BYTES])
        yield b'"'
    yield b"]}"
