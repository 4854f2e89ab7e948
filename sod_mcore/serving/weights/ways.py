"""The way that tensors take to the engines, by ``serving.weight_sync``."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sod_mcore.serving.weights.cuda_handles import ByCudaHandle
from sod_mcore.serving.weights.distributed_transfer import DistributedTransfer
from sod_mcore.serving.weights.kept_groups import KeptGroups
from sod_mcore.serving.weights.tensor_check import Bucket
from sod_mcore.serving.weights.tensor_transfer import TensorTransfer
from sod_mcore.serving.weights.transfer import WeightTransfer


def tensor_transfer(
    weight_sync: str, buckets: Iterable[Bucket], device: torch.device, groups: KeptGroups | None
) -> WeightTransfer:
    """A transfer without a disk.

    Args:
        device: of the buckets.
        groups: of the engines, for "distributed".

    Raises:
        ValueError: ``weight_sync`` is no such way.
    """
    if weight_sync == "tensor":
        return TensorTransfer(buckets)
    if weight_sync == "cuda_ipc":
        return TensorTransfer(buckets, ByCudaHandle(device))
    if weight_sync == "distributed" and groups is not None:
        return DistributedTransfer(buckets, groups)
    raise ValueError(f"serving.weight_sync={weight_sync} sends no tensors")
