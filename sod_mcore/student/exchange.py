"""Host data between ranks, over gloo: plans from rank 0 to all, arrays from all to rank 0.

Nothing here touches the device, so ranks that wait for a rollout do not sit in a device collective.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from sod_mcore.config import ConfigError

Value = TypeVar("Value")


def broadcast_from_rank0(
    value: Value | None, group: dist.ProcessGroup, timeout: timedelta | None = None
) -> Value:
    """Send ``value`` from the group's rank 0 to all its ranks, as flat bytes.

    Args:
        value: any picklable object on rank 0; ignored elsewhere.
        group: a group with a gloo backend for CPU tensors.
        timeout: longest wait for rank 0; None takes the group's own.

    Raises:
        RuntimeError: rank 0 did not send in time.
    """
    is_source = dist.get_rank(group) == 0
    payload = pickle.dumps(value, protocol=5) if is_source else b""
    size = torch.tensor([len(payload)], dtype=torch.int64)
    _broadcast(size, group, timeout)
    if is_source:
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    else:
        data = torch.empty(int(size), dtype=torch.uint8)
    _broadcast(data, group, timeout)
    if is_source:
        return value  # type: ignore[return-value]
    result: Value = pickle.loads(data.numpy().data)
    return result


def _broadcast(tensor: torch.Tensor, group: dist.ProcessGroup, timeout: timedelta | None) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    if timeout is not None:
        options.timeout = timeout
    group.broadcast([tensor], options).wait()


def gather_to_rank0(
    arrays: Sequence[NDArray[np.float32]] | None, group: dist.ProcessGroup
) -> list[NDArray[np.float32]] | None:
    """Collect float32 vectors on the group's rank 0, in rank order, as flat bytes.

    Args:
        arrays: this rank's vectors; None (or nothing) where it has none.

    Returns:
        on rank 0 the vectors of all ranks, one after another; None elsewhere.
    """
    mine = list(arrays or ())
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    counts = torch.zeros(world_size, 2, dtype=torch.int64)
    counts[rank] = torch.tensor([len(mine), sum(map(len, mine))])
    dist.all_reduce(counts, group=group)
    if rank != 0:
        if mine:
            _send(np.array([len(array) for array in mine], dtype=np.int64), group)
            _send(np.concatenate(mine), group)
        return None
    result = mine
    for source in range(1, world_size):
        num_arrays, num_values = counts[source].tolist()
        if num_arrays:
            lengths = _receive(num_arrays, torch.int64, source, group)
            values = _receive(num_values, torch.float32, source, group)
            result.extend(np.split(values, np.cumsum(lengths)[:-1]))
    return result


def wait_for_all(group: dist.ProcessGroup) -> None:
    """Return when every rank is here; a barrier that leaves the device alone."""
    dist.all_reduce(torch.zeros(1), group=group)


def agree_on_problem(problem: str | None) -> None:
    """End every rank in the same way when one of them has found a fault; collective over all ranks.

    Raises:
        ConfigError: ``problem`` of the first rank that has one.
    """
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((text for text in problems if text is not None), None)
    if first is not None:
        raise ConfigError(first)


def gather_objects(value: Value, group: dist.ProcessGroup) -> list[Value]:
    """The small picklable ``value`` of every rank of the group, in rank order, on all of them."""
    gathered: list[Value | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered  # type: ignore[return-value]


def sum_over_ranks(values: dict[str, float], group: dist.ProcessGroup) -> dict[str, float]:
    """Sum dictionaries of numbers over the group; missing names count as 0."""
    gathered: list[dict[str, float] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, values, group=group)
    totals: dict[str, float] = {}
    for part in gathered:
        for name, value in (part or {}).items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def _send(array: NDArray[Any], group: dist.ProcessGroup) -> None:
    dist.send(torch.from_numpy(array), group=group, group_dst=0)


def _receive(count: int, dtype: torch.dtype, source: int, group: dist.ProcessGroup) -> NDArray[Any]:
    buffer = torch.empty(count, dtype=dtype)
    dist.recv(buffer, group=group, group_src=source)
    return buffer.numpy()
