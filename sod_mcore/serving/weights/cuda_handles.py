"""Weights as handles of CUDA memory: the engines read the trainer's GPU, and nothing is copied out.

A handle (CUDA IPC) names an allocation of a process on the same machine. Torch counts, in memory
that both processes share, how many were opened: each must be opened once, by one reader, so every
rank of every engine gets its own. An allocation lives until its last reader has let go of it.

A bucket is packed into one allocation, in SGLang's format "flattened_bucket", so that there is one
handle for all of its tensors.

This has never run with a GPU: ``tests/serving/weights/gpu_check.py`` is the check to begin with.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing import reductions

from sod_mcore.serving.weights.receivers import Receiver
from sod_mcore.serving.weights.tensor_check import Bucket
from sod_mcore.serving.weights.transfer import WeightUpdateError

DEVICE_ARGUMENT = 6
"""Position of the GPU's index among the arguments of torch's ``rebuild_cuda_tensor``."""
ALIGNMENT = 16
"""Bytes; a tensor of any type can begin at a multiple of it."""

Reduced = tuple[Callable[..., torch.Tensor], tuple[Any, ...]]
"""A function by its name, and the arguments with which it makes the tensor anew."""


def handle_of(tensor: torch.Tensor) -> Reduced:
    """A handle of a CUDA tensor, for one reader.

    It names the GPU by its UUID, as SGLang's readers expect: the index may mean another GPU there
    (``CUDA_VISIBLE_DEVICES``).
    """
    rebuild, arguments = reductions.reduce_tensor(tensor)
    before, after = arguments[:DEVICE_ARGUMENT], arguments[DEVICE_ARGUMENT + 1 :]
    uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
    return rebuild, (*before, uuid, *after)


@dataclass
class ByCudaHandle:
    """Handles of each bucket, packed into memory that is kept until its readers have answered.

    Attributes:
        device: the GPU of that memory.
        reduce: makes a handle.
        collect: frees memory whose readers are done.
    """

    device: torch.device
    reduce: Callable[[torch.Tensor], Reduced] = handle_of
    collect: Callable[[], None] = torch.cuda.ipc_collect
    load_format: str | None = field(default="flattened_bucket", init=False)
    _packed: torch.Tensor | None = field(default=None, init=False)

    def check(self, receivers: Sequence[Receiver]) -> None:
        """Refuse engines that would not open each handle exactly once.

        Raises:
            WeightUpdateError: an engine has no GPU, or pipeline stages: each of them opens the
                handle of its tensor-parallel rank (SGLang 0.5.23), and torch's counter goes wrong.
        """
        for receiver in receivers:
            if receiver.device != "cuda" or receiver.pipeline_stages > 1:
                raise WeightUpdateError(
                    f"{receiver.url} runs on {receiver.device or 'an unknown device'} with "
                    f"{receiver.pipeline_stages} pipeline stages; serving.weight_sync=cuda_ipc "
                    "reaches engines on GPUs with one stage: set it to disk"
                )

    def payloads(self, bucket: Bucket, readers: int) -> Sequence[bytes]:
        """A pickle for each reader, with a handle of its own.

        Raises:
            WeightUpdateError: the GPU has no room for the bucket, or makes no handle.
        """
        try:
            self._packed, metadata = _pack(bucket, self.device)
            flattened = {"flattened_tensor": self._packed, "metadata": metadata}
            return [self._pickled(flattened) for _ in range(readers)]
        except RuntimeError as error:
            raise WeightUpdateError(f"no handles of a bucket could be made: {error}") from error

    def release(self) -> None:
        """Free the bucket, once every handle was opened and let go of.

        A rank of an engine that is a moment later than its first one delays that until the next
        bucket; a handle that a dead engine has not opened, or not let go of, until this process
        ends.
        """
        self._packed = None
        self.collect()

    def _pickled(self, flattened: dict[str, Any]) -> bytes:
        buffer = io.BytesIO()
        _HandlePickler(buffer, self.reduce).dump(flattened)
        return buffer.getvalue()


def _pack(bucket: Bucket, device: torch.device) -> tuple[torch.Tensor, list[SimpleNamespace]]:
    """The bytes of all tensors, uint8 ``[n]``, and where each of them is.

    SGLang reads the attributes of its own ``FlattenedTensorMetadata``, which is not installed here.
    """
    metadata, end = [], 0
    for name, tensor in bucket:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + tensor.nbytes
        place = {"start_idx": start, "end_idx": end, "numel": tensor.nbytes}
        metadata.append(SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, **place))
    packed = torch.empty(end, dtype=torch.uint8, device=device)
    for (_, tensor), found in zip(bucket, metadata, strict=True):
        room = packed[found.start_idx : found.end_idx].view(found.dtype).view(found.shape)
        room.copy_(tensor.detach())
    return packed, metadata


class _HandlePickler(pickle.Pickler):
    """Writes what ``reduce`` says where a tensor is."""

    def __init__(self, file: io.BytesIO, reduce: Callable[[torch.Tensor], Reduced]) -> None:
        super().__init__(file)
        self._reduce = reduce

    def reducer_override(self, value: Any) -> Any:
        """Called by pickle for each object."""
        return self._reduce(value) if isinstance(value, torch.Tensor) else NotImplemented
