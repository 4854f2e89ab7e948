"""Core attention on torch's scaled_dot_product_attention, for padded and for packed rows.

Megatron's own attention without TransformerEngine refuses packed rows and makes a score matrix of
``[batch * heads, s, s]``. This one needs no mask tensor and gets fused kernels on every device. A
packed row is cut into its sequences; those of similar length are attended to as one padded batch,
so that the number of kernels grows with the logarithm of the longest sequence and not with the
number of sequences, and less than half of a batch is padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class LengthGroup:
    """Sequences of a packed row whose lengths lie between one power of two and the next.

    Attributes:
        gather: int64 ``[sequences * longest]``, row index of each cell; cells past a sequence's end
            repeat some row of the pack (causality keeps them from real tokens).
        cells: int64 ``[tokens]``, the cells that hold real tokens.
        rows: int64 ``[tokens]``, the row index of each of those cells.
    """

    num_sequences: int
    gather: torch.Tensor
    cells: torch.Tensor
    rows: torch.Tensor


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's description of a packed row, with the grouping that :class:`SDPAttention` uses."""

    length_groups: tuple[LengthGroup, ...] = field(default=())


def describe_packed_row(lengths: Sequence[int], device: torch.device) -> PackedRow:
    """The packed row of sequences of these lengths, end to end."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    members = defaultdict(list)
    for start, length in zip(bounds[:-1].tolist(), lengths, strict=True):
        members[(length - 1).bit_length()].append((start, length))
    cu_seqlens = bounds.to(device=device, dtype=torch.int32)
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        length_groups=tuple(_length_group(group, device) for group in members.values()),
    )


def _length_group(sequences: Sequence[tuple[int, int]], device: torch.device) -> LengthGroup:
    starts = torch.tensor([start for start, _ in sequences]).unsqueeze(1)
    lengths = torch.tensor([length for _, length in sequences]).unsqueeze(1)
    columns = torch.arange(int(lengths.max()))
    is_real = columns < lengths  # [sequences, longest]
    gather = starts + torch.minimum(columns, lengths - 1)
    return LengthGroup(
        num_sequences=len(sequences),
        gather=gather.flatten().to(device),
        cells=is_real.flatten().nonzero().squeeze(1).to(device),
        rows=gather[is_real].to(device),
    )


class SDPAttention(MegatronModule):
    """Causal attention with grouped queries; takes the place of ``DotProductAttention``."""

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend causally within each sequence.

        Args:
            query: ``[s, b, heads/tp, d]``, or ``[t, heads/tp, d]`` for a packed row.
            key: as ``query`` with ``groups/tp`` heads; so is ``value``.
            attention_mask: must be None: rows are padded at their end and packed rows are described
                by ``packed_seq_params``, so causality is the whole mask.

        Returns:
            ``[s, b, heads/tp * d]``, or ``[t, heads/tp * d]`` for a packed row.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("SDPAttention is causal; it takes no mask and no bias")
        if packed_seq_params is None:
            batched = (tensor.transpose(0, 1) for tensor in (query, key, value))
            return self._attend(*batched).transpose(0, 1).flatten(2)
        if not isinstance(packed_seq_params, PackedRow):
            raise TypeError("packed rows must be described by describe_packed_row")
        return self._attend_packed(query, key, value, packed_seq_params)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``[b, s, heads, d]`` each -> ``[b, s, heads, d]``."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)

    def _attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PackedRow
    ) -> torch.Tensor:
        outputs = []
        for group in row.length_groups:
            batched = (
                tensor.index_select(0, group.gather).unflatten(0, (group.num_sequences, -1))
                for tensor in (query, key, value)
            )
            attended = self._attend(*batched).flatten(0, 1)  # [sequences * longest, heads, d]
            outputs.append(attended.index_select(0, group.cells))
        order = torch.cat([group.rows for group in row.length_groups])
        result = torch.empty_like(query).index_copy(0, order, torch.cat(outputs))
        return result.flatten(1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Nothing: this module has no state."""
        return {}
