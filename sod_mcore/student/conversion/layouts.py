"""How one Megatron parameter is cut from, and put together to, Hugging Face tensors.

Each layout is a pair of pure functions. ``shard`` reads only what one tensor-parallel rank needs:
its inputs may be lazy slices of a safetensors file. ``merge`` takes the shards of all
tensor-parallel ranks, in order, and returns the Hugging Face tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from sod_mcore.student.architecture import Architecture
from sod_mcore.student.model_config import padded_vocab_size

Shape = tuple[int, ...]


class LazyTensor(Protocol):
    """A tensor, or a slice object of safetensors: reads what is indexed."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read a part."""


class Layout(ABC):
    """One way in which a parameter is split over ``size`` tensor-parallel ranks."""

    @abstractmethod
    def shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors."""

    @abstractmethod
    def shard(
        self, tensors: Sequence[LazyTensor], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        """The parameter of tensor-parallel rank ``rank``."""

    @abstractmethod
    def merge(
        self, shards: Sequence[torch.Tensor], architecture: Architecture
    ) -> tuple[torch.Tensor, ...]:
        """The Hugging Face tensors, from the shards of all ranks."""


class Replicated(Layout):
    """Every rank holds the whole tensor."""

    def __init__(self, width: str) -> None:
        self.width = width

    def shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        return ((getattr(architecture, self.width),),)

    def shard(
        self, tensors: Sequence[LazyTensor], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        return tensors[0][:]

    def merge(
        self, shards: Sequence[torch.Tensor], architecture: Architecture
    ) -> tuple[torch.Tensor, ...]:
        return (shards[0],)


class Vocabulary(Layout):
    """``[vocab, hidden]``: rows are split after padding; padding rows are 0 and never exported."""

    def shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        return ((architecture.vocab_size, architecture.hidden_size),)

    def shard(
        self, tensors: Sequence[LazyTensor], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        rows = padded_vocab_size(architecture.vocab_size, size) // size
        start = min(rank * rows, architecture.vocab_size)
        stop = min(start + rows, architecture.vocab_size)
        real = tensors[0][start:stop]
        padding = real.new_zeros(rows - real.shape[0], architecture.hidden_size)
        return torch.cat([real, padding])

    def merge(
        self, shards: Sequence[torch.Tensor], architecture: Architecture
    ) -> tuple[torch.Tensor, ...]:
        return (torch.cat(list(shards))[: architecture.vocab_size],)


class SplitColumns(Layout):
    """``[hidden, width]``: the input dimension is split (row-parallel linear layers)."""

    def __init__(self, *width: str) -> None:
        self.width = width

    def shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        columns = 1
        for factor in self.width:
            columns *= getattr(architecture, factor)
        return ((architecture.hidden_size, columns),)

    def shard(
        self, tensors: Sequence[LazyTensor], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        columns = self.shapes(architecture)[0][1] // size
        return tensors[0][:, rank * columns : (rank + 1) * columns]

    def merge(
        self, shards: Sequence[torch.Tensor], architecture: Architecture
    ) -> tuple[torch.Tensor, ...]:
        return (torch.cat(list(shards), dim=1),)


class GateAndUp(Layout):
    """Each rank holds its part of the gate, then its part of the up projection."""

    def shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        return ((architecture.ffn_hidden_size, architecture.hidden_size),) * 2

    def shard(
        self, tensors: Sequence[LazyTensor], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        rows = architecture.ffn_hidden_size // size
        return torch.cat([tensor[rank * rows : (rank + 1) * rows] for tensor in tensors])

    def merge(
        self, shards: Sequence[torch.Tensor], architecture: Architecture
    ) -> tuple[torch.Tensor, ...]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat(gates), torch.cat(ups)


class QueryKeyValue(Layout):
    """For each key-value group in turn: its queries' rows, its key rows, its value rows."""

    def __init__(self, *, is_bias: bool = False) -> None:
        self.is_bias = is_bias

    def shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        tail = () if self.is_bias else (architecture.hidden_size,)
        queries = architecture.num_attention_heads * architecture.kv_channels
        keys = architecture.num_query_groups * architecture.kv_channels
        return ((queries, *tail), (keys, *tail), (keys, *tail))

    def shard(
        self, tensors: Sequence[LazyTensor], architecture: Architecture, rank: int, size: int
    ) -> torch.Tensor:
        groups = architecture.num_query_groups // size
        parts = []
        for tensor, (all_rows, *_) in zip(tensors, self.shapes(architecture), strict=True):
            rows = all_rows // size
            part = tensor[rank * rows : (rank + 1) * rows]
            parts.append(part.unflatten(0, (groups, -1)))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def merge(
        self, shards: Sequence[torch.Tensor], architecture: Architecture
    ) -> tuple[torch.Tensor, ...]:
        width = architecture.kv_channels
        queries = architecture.num_attention_heads // architecture.num_query_groups * width
        grouped = torch.cat(list(shards)).unflatten(0, (architecture.num_query_groups, -1))
        parts = grouped.split([queries, width, width], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)
