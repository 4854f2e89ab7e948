"""Weights as handles of CUDA memory: the engines read the trainer's GPU, and nothing is copied out.

A handle (CUDA IPC) names an allocation of a process on the same machine. Torch counts, in memory
that both processes share, how many were opened: each must be opened once, by one reader, so every
rank of every engine gets its own. An allocation lives until its last reader has let go of it.

This has never run with a GPU: ``tests/serving/weights/gpu_check.py`` is the check to begin with.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing import reductions

from sod_mcore.serving.weights.tensor_check import Bucket

DEVICE_ARGUMENT = 6
"""Position of the GPU's index among the arguments of torch's ``rebuild_cuda_tensor``."""

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
    """Handles of a copy of each bucket, which is kept until its readers have answered.

    The copy is there because a bucket may hold the model's own parameters: torch would count their
    readers anew at each update, for as long as the model lives.

    Attributes:
        device: the GPU of the copy.
        reduce: makes a handle.
        collect: frees copies whose readers are done.
    """

    device: torch.device
    reduce: Callable[[torch.Tensor], Reduced] = handle_of
    collect: Callable[[], None] = torch.cuda.ipc_collect
    _kept: list[tuple[str, torch.Tensor]] = field(default_factory=list)

    def payloads(self, bucket: Bucket, readers: int) -> Sequence[bytes]:
        """A pickle with handles of its own for each reader."""
        self._kept = [(name, self._copy(tensor)) for name, tensor in bucket]
        return [self._pickled() for _ in range(readers)]

    def release(self) -> None:
        """Free the copies, but for those whose handles an engine has not opened."""
        self._kept.clear()
        self.collect()

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        return copy.copy_(tensor.detach())

    def _pickled(self) -> bytes:
        buffer = io.BytesIO()
        _HandlePickler(buffer, self.reduce).dump(self._kept)
        return buffer.getvalue()


class _HandlePickler(pickle.Pickler):
    """Writes what ``reduce`` says where a tensor is."""

    def __init__(self, file: io.BytesIO, reduce: Callable[[torch.Tensor], Reduced]) -> None:
        super().__init__(file)
        self._reduce = reduce

    def reducer_override(self, value: Any) -> Any:
        """Called by pickle for each object."""
        return self._reduce(value) if isinstance(value, torch.Tensor) else NotImplemented
