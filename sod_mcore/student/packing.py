"""From examples to the tensors of one micro-batch: the one place where targets are shifted.

The model's output at position ``t - 1`` predicts token ``t``. So the token at ``t`` that carries
loss becomes the row ``t - 1`` of its sequence, and its target, advantage and so on are read at
``t``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sod_mcore.student.attention import PackedRow, describe_packed_row
from sod_mcore.student.examples import TrainingExample

Packing = Literal["packed", "padded"]

PAD_TOKEN = 0
"""Fills the end of rows; no real token attends to it and it carries no loss."""


@dataclass(frozen=True)
class LossRows:
    """The ``N`` tokens of a micro-batch that carry loss, ordered by example, then by position.

    Attributes:
        rows: int64 ``[N]``, rows of the hidden states ``[s, b, h]`` flattened to ``[s * b, h]``.
        targets: int64 ``[N]``, the tokens that these rows predict.
        teacher_topk_ids: int32 ``[N, K]``; ``teacher_topk_logprobs`` likewise float32.
        other fields: float32 ``[N]``, or None where the examples do not have them.
    """

    rows: torch.Tensor
    targets: torch.Tensor
    advantages: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    teacher_logprobs: torch.Tensor | None = None
    teacher_topk_ids: torch.Tensor | None = None
    teacher_topk_logprobs: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass.

    Attributes:
        token_ids: int64 ``[b, s]``; ``b`` is 1 for a packed row.
        position_ids: int64 ``[b, s]``, restarting with each sequence.
        packed_row: bounds of the sequences in a packed row, else None.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    packed_row: PackedRow | None
    loss_rows: LossRows


def pack_micro_batch(
    examples: Sequence[TrainingExample],
    *,
    packing: Packing,
    device: torch.device,
    length_multiple: int = 1,
) -> MicroBatch:
    """Lay examples out as one packed row, or as one padded row each.

    Args:
        examples: may be empty; then the micro-batch is padding alone and carries no loss.
        length_multiple: row lengths are padded to a multiple of this (the tensor-parallel size with
            sequence parallelism, else 1).
    """
    lengths = [len(example) for example in examples] or [length_multiple]
    if packing == "packed":
        starts, stride = np.cumsum([0, *lengths])[:-1], 1
        num_rows, row_length = 1, round_up(sum(lengths), length_multiple)
    else:
        starts, stride = np.arange(len(lengths)), len(lengths)
        num_rows, row_length = len(lengths), round_up(max(lengths), length_multiple)
    # Column-major cells: cell t * b + i of the flattened [s, b] is position t of row i.
    token_ids = np.full(num_rows * row_length, PAD_TOKEN, dtype=np.int64)
    position_ids = np.zeros(num_rows * row_length, dtype=np.int64)
    rows = []
    for example, start in zip(examples, starts[: len(examples)], strict=True):
        positions = np.arange(len(example))
        cells = start + positions * stride
        token_ids[cells] = example.token_ids
        position_ids[cells] = positions
        rows.append(cells[:-1][example.loss_mask[1:]])
    packed_row = None
    if packing == "packed":
        padding = row_length - sum(lengths)
        packed_row = describe_packed_row([*lengths, *([padding] if padding else [])], device)
    return MicroBatch(
        token_ids=_as_rows(token_ids, num_rows, device),
        position_ids=_as_rows(position_ids, num_rows, device),
        packed_row=packed_row,
        loss_rows=_loss_rows(examples, rows, device),
    )


def split_by_example(
    values: NDArray[np.float32], examples: Sequence[TrainingExample]
) -> list[NDArray[np.float32]]:
    """Undo the shift: ``[N]`` values of loss rows -> per example float32 ``[T]``, NaN elsewhere."""
    result = []
    offset = 0
    for example in examples:
        whole = np.full(len(example), np.nan, dtype=np.float32)
        whole[example.loss_mask] = values[offset : offset + example.num_loss_tokens]
        offset += example.num_loss_tokens
        result.append(whole)
    if offset != len(values):
        raise ValueError(f"{len(values)} values for {offset} tokens that carry loss")
    return result


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``number``."""
    return -(-number // multiple) * multiple


def _as_rows(cells: NDArray[np.int64], num_rows: int, device: torch.device) -> torch.Tensor:
    """Cells of ``[s, b]`` -> tensor ``[b, s]``."""
    return torch.from_numpy(cells.reshape(-1, num_rows).T.copy()).to(device)


def _loss_rows(
    examples: Sequence[TrainingExample], rows: Sequence[NDArray[np.int64]], device: torch.device
) -> LossRows:
    def gather(name: str) -> torch.Tensor | None:
        # Examples without loss tokens may lack a field: a trajectory that was not scored does.
        with_loss = [example for example in examples if example.num_loss_tokens > 0]
        arrays = [getattr(example, name) for example in with_loss]
        if not arrays or any(array is None for array in arrays):
            return None
        values = np.concatenate(
            [array[example.loss_mask] for array, example in zip(arrays, with_loss, strict=True)]
        )
        return torch.from_numpy(values).to(device)

    targets = gather("token_ids")
    fields: dict[str, Any] = {
        name: gather(name)
        for name in (
            "advantages",
            "token_weights",
            "old_logprobs",
            "teacher_logprobs",
            "teacher_topk_ids",
            "teacher_topk_logprobs",
        )
    }
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    return LossRows(
        rows=torch.from_numpy(np.concatenate(rows)).to(device) if rows else empty,
        targets=targets.long() if targets is not None else empty,
        **fields,
    )
