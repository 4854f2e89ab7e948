"""The output layer with what follows it: logits of all rows at once, or of a chunk at a time.

Both take the rows that carry loss out of the hidden states first, so prompt and tool-output tokens
cost no logits. Where all logits exist they are as precise as the model, and their gradient takes
their place; chunked ones never exist beyond a chunk (benchmarks/output_head.py measures both).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from sod_mcore import ops
from sod_mcore.config import StudentConfig


@dataclass(frozen=True)
class OutputStates:
    """What ``GPTModel`` hands to an output processor, and the rows that are wanted of it.

    Attributes:
        hidden_states: ``[s, b, h]``, or ``[s/tp, b, h]`` with sequence parallelism.
        output_weight: the embedding's weight where it is tied, else None.
        rows: int64 ``[N]``, of the whole hidden states flattened to ``[s * b, h]``.
        group: tensor-parallel group.
    """

    hidden_states: torch.Tensor
    output_layer: ColumnParallelLinear
    output_weight: torch.Tensor | None
    rows: torch.Tensor
    group: dist.ProcessGroup

    def weight(self) -> torch.Tensor:
        """The parameter ``[V/tp, h]`` of the output layer, up to date.

        Megatron's overlapped gathering of parameters waits in hooks that run before the module that
        owns a parameter; a weight that is taken without its module would be the one of the update
        before.
        """
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        return self.output_layer.weight if self.output_weight is None else self.output_weight


class OutputHead(Protocol):
    """Log-probs or losses of rows; ``options`` are those of the operation in ``sod_mcore.ops``."""

    def logprobs(
        self, states: OutputStates, targets: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the targets and entropies, ``[N]`` each."""

    def loss(
        self, states: OutputStates, targets: torch.Tensor, **options: Any
    ) -> ops.StepWeightedKL:
        """The objective's loss of each row."""


@dataclass(frozen=True)
class FullHead:
    """The logits of all rows exist at once; the choice where they fit."""

    def logprobs(
        self, states: OutputStates, targets: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_of_rows(states)
        return ops.vocab_parallel_logprobs(logits, targets, overwrite_logits=True, **options)

    def loss(
        self, states: OutputStates, targets: torch.Tensor, **options: Any
    ) -> ops.StepWeightedKL:
        logits = logits_of_rows(states)
        return ops.step_weighted_kl(logits, targets, overwrite_logits=True, **options)


@dataclass(frozen=True)
class ChunkedHead:
    """The logits of ``chunk_rows`` rows exist at a time.

    Attributes:
        logits_dtype: float32 keeps what the matrix product accumulates; None rounds it to the
            model's precision.
    """

    chunk_rows: int
    logits_dtype: torch.dtype | None = None

    def logprobs(
        self, states: OutputStates, targets: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.linear_vocab_parallel_logprobs(
            _hidden_of_rows(states), states.weight(), targets, **self._chunking(), **options
        )

    def loss(
        self, states: OutputStates, targets: torch.Tensor, **options: Any
    ) -> ops.StepWeightedKL:
        return ops.linear_step_weighted_kl(
            _hidden_of_rows(states), states.weight(), targets, **self._chunking(), **options
        )

    def _chunking(self) -> dict[str, Any]:
        return {"chunk_rows": self.chunk_rows, "logits_dtype": self.logits_dtype}


def make_output_head(student: StudentConfig) -> OutputHead:
    """The head that the configuration names."""
    if student.lm_head == "full":
        return FullHead()
    return ChunkedHead(
        chunk_rows=student.lm_head_chunk_rows,
        logits_dtype=torch.float32 if student.lm_head_dtype == "fp32" else None,
    )


def logits_of_rows(states: OutputStates) -> torch.Tensor:
    """Local logits ``[N, V/tp]`` of the rows, by Megatron's output layer.

    The sequence-parallel region is gathered first: a rank's rows are a slice of the sequence, so
    selecting before the gather would select other tokens on every rank. The gather's backward then
    sums the gradient over the ranks, and the output layer must not do so again.
    """
    layer = states.output_layer
    num_rows = states.rows.shape[0]
    # One row, cut away again below: every parameter still gets a gradient (of zero), which
    # overlapped gradient reduction waits for.
    rows = states.rows if num_rows else states.rows.new_zeros(1)
    selected = _whole_hidden_states(states).flatten(0, 1).index_select(0, rows)
    with _input_is_whole(layer, layer.sequence_parallel):
        logits, _ = layer(selected, weight=states.output_weight, runtime_gather_output=False)
    return logits if num_rows else logits[:0]


def _hidden_of_rows(states: OutputStates) -> torch.Tensor:
    """``[N, h]``, whose gradient may be this rank's summand: it is summed over the ranks."""
    hidden = _whole_hidden_states(states).flatten(0, 1).index_select(0, states.rows)
    if not states.output_layer.sequence_parallel:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=states.group)
    return hidden


def _whole_hidden_states(states: OutputStates) -> torch.Tensor:
    if not states.output_layer.sequence_parallel:
        return states.hidden_states
    return gather_from_sequence_parallel_region(
        states.hidden_states, tensor_parallel_output_grad=True, group=states.group
    )


@contextmanager
def _input_is_whole(layer: ColumnParallelLinear, was_gathered: bool) -> Iterator[None]:
    """The layer neither gathers its input nor reduces the input's gradient, if that is done."""
    if not was_gathered:
        yield
        return
    layer.sequence_parallel = False
    layer.disable_grad_reduce = True
    try:
        yield
    finally:
        layer.sequence_parallel = True
        layer.disable_grad_reduce = False
