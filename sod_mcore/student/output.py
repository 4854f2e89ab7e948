"""From the last hidden states to one number per token: the output processor of ``GPTModel``.

``GPTModel.forward(output_processor=..., output_processor_context=...)`` hands over the hidden
states before any logits exist. Only the rows that carry loss go through the output layer, so prompt
and tool-output tokens cost no logits, and there is no float32 copy of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from sod_mcore import ops
from sod_mcore.student.packing import LossRows

TERM_PREFIX = "terms/"
"""Marks the summands of the loss among the sums."""


@dataclass
class OutputContext:
    """What an output processor needs, and where it leaves its statistics.

    Attributes:
        vocab_size: number of real tokens; later columns are padding.
        group: tensor-parallel group over which the logits are split.
        objective: the loss; None for plain log-probs.
        sums: filled by the processor: name -> sum over the micro-batch's loss tokens, detached.
    """

    loss_rows: LossRows
    vocab_size: int
    group: dist.ProcessGroup
    objective: ops.Objective | None = None
    sums: dict[str, torch.Tensor] = field(default_factory=dict)


def token_logprobs(
    *,
    hidden_states: torch.Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: torch.Tensor | None,
    context: OutputContext,
    **unused: Any,
) -> torch.Tensor:
    """Log-probs of the micro-batch's loss tokens, float32 ``[N]``, differentiable."""
    logits = logits_of_rows(hidden_states, output_layer, output_weight, context)
    logprobs, entropy = ops.vocab_parallel_logprobs(
        logits, context.loss_rows.targets, vocab_size=context.vocab_size, group=context.group
    )
    context.sums["loss"] = -logprobs.detach().sum()
    context.sums["entropy"] = entropy.detach().sum()
    return logprobs


def token_losses(
    *,
    hidden_states: torch.Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: torch.Tensor | None,
    context: OutputContext,
    **unused: Any,
) -> torch.Tensor:
    """The objective's loss of the micro-batch's loss tokens, float32 ``[N]``, differentiable."""
    rows, objective = context.loss_rows, context.objective
    if objective is None:
        raise ValueError("token_losses needs an objective; use token_logprobs without one")
    logits = logits_of_rows(hidden_states, output_layer, output_weight, context)
    if len(rows) == 0:  # then there are no fields either; every tensor-parallel rank knows it
        return logits.float().sum(dim=-1)
    advantages = _required("advantages", rows)
    old_logprobs = _required("old_logprobs", rows)
    result = ops.step_weighted_kl(
        logits,
        rows.targets,
        vocab_size=context.vocab_size,
        group=context.group,
        temperature=1.0,
        token_weights=_required("token_weights", rows),
        advantages=advantages,
        old_logprobs=old_logprobs,
        teacher_logprobs=rows.teacher_logprobs,
        teacher_topk_ids=rows.teacher_topk_ids,
        teacher_topk_logprobs=rows.teacher_topk_logprobs,
        objective=objective,
        overwrite_logits=True,
    )
    is_dual_clipped = torch.zeros_like(result.is_clipped)
    if objective.dual_clip is not None:
        is_dual_clipped = (advantages < 0) & (result.ratio > objective.dual_clip)
    context.sums |= {
        "loss": result.token_loss.detach().sum(),
        "entropy": result.entropy.sum(),
        "clip_fraction": (result.is_clipped & ~is_dual_clipped).sum(),
        "dual_clip_fraction": is_dual_clipped.sum(),
        "approx_kl": (old_logprobs - result.logprobs).sum(),
        **{f"{TERM_PREFIX}{name}": values.sum() for name, values in result.terms.items()},
    }
    return result.token_loss


def logits_of_rows(
    hidden_states: torch.Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: torch.Tensor | None,
    context: OutputContext,
) -> torch.Tensor:
    """Local logits ``[N, V/tp]`` of the rows that carry loss.

    The sequence-parallel region is gathered first: a rank's rows are a slice of the sequence, so
    selecting before the gather would select other tokens on every rank. The gather's backward then
    sums the gradient over the ranks, and the output layer must not do so again.

    Args:
        hidden_states: ``[s, b, h]``, or ``[s/tp, b, h]`` with sequence parallelism.
        output_weight: the embedding's weight where it is tied, else None.
    """
    is_sequence_parallel = output_layer.sequence_parallel
    if is_sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True, group=context.group
        )
    rows = context.loss_rows.rows
    num_rows = rows.shape[0]
    if num_rows == 0:
        # One row, cut away again below: every parameter still gets a gradient (of zero), which
        # overlapped gradient reduction waits for.
        rows = rows.new_zeros(1)
    selected = hidden_states.flatten(0, 1).index_select(0, rows)
    with _input_is_whole(output_layer, is_sequence_parallel):
        logits, _ = output_layer(selected, weight=output_weight, runtime_gather_output=False)
    return logits if num_rows else logits[:0]


@contextmanager
def _input_is_whole(output_layer: ColumnParallelLinear, was_gathered: bool) -> Iterator[None]:
    """The layer neither gathers its input nor reduces the input's gradient, if that is done."""
    if not was_gathered:
        yield
        return
    output_layer.sequence_parallel = False
    output_layer.disable_grad_reduce = True
    try:
        yield
    finally:
        output_layer.sequence_parallel = True
        output_layer.disable_grad_reduce = False


def _required(name: str, rows: LossRows) -> torch.Tensor:
    values: torch.Tensor | None = getattr(rows, name)
    if values is None:
        raise ValueError(f"the objective needs {name}, but the training examples have none")
    return values
