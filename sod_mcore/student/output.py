"""From the last hidden states to one number per token: the output processor of ``GPTModel``.

``GPTModel.forward(output_processor=..., output_processor_context=...)`` hands over the hidden
states before any logits exist. There is no subclass, no patched forward, and no float32 copy of the
logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from sod_mcore import ops
from sod_mcore.student.output_head import OutputHead, OutputStates
from sod_mcore.student.packing import LossRows

TERM_PREFIX = "terms/"
"""Marks the summands of the loss among the sums."""


@dataclass
class OutputContext:
    """What an output processor needs, and where it leaves its statistics.

    Attributes:
        vocab_size: number of real tokens; later columns are padding.
        group: tensor-parallel group over which the logits are split.
        head: how output layer and loss are computed.
        objective: the loss; None for plain log-probs.
        sums: filled by the processor: name -> sum over the micro-batch's loss tokens, detached.
    """

    loss_rows: LossRows
    vocab_size: int
    group: dist.ProcessGroup
    head: OutputHead
    objective: ops.Objective | None = None
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """What every operation on the logits is told."""
        return {"vocab_size": self.vocab_size, "group": self.group, "temperature": 1.0}


def token_logprobs(
    *,
    hidden_states: torch.Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: torch.Tensor | None,
    context: OutputContext,
    **unused: Any,
) -> torch.Tensor:
    """Log-probs of the micro-batch's loss tokens, float32 ``[N]``, differentiable."""
    states = _states(hidden_states, output_layer, output_weight, context)
    logprobs, entropy = context.head.logprobs(states, context.loss_rows.targets, **context.options)
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
    states = _states(hidden_states, output_layer, output_weight, context)
    if len(rows) == 0:  # then there are no fields either; every tensor-parallel rank knows it
        return context.head.logprobs(states, rows.targets, **context.options)[0]
    inputs = _loss_inputs(rows, objective)
    result = context.head.loss(
        states, rows.targets, objective=objective, **inputs, **context.options
    )
    is_dual_clipped = torch.zeros_like(result.is_clipped)
    if objective.dual_clip is not None:
        is_dual_clipped = (inputs["advantages"] < 0) & (result.ratio > objective.dual_clip)
    context.sums |= {
        "loss": result.token_loss.detach().sum(),
        "entropy": result.entropy.sum(),
        "clip_fraction": (result.is_clipped & ~is_dual_clipped).sum(),
        "dual_clip_fraction": is_dual_clipped.sum(),
        "approx_kl": (inputs["old_logprobs"] - result.logprobs).sum(),
        **{f"{TERM_PREFIX}{name}": values.sum() for name, values in result.terms.items()},
    }
    return result.token_loss


def _states(
    hidden_states: torch.Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: torch.Tensor | None,
    context: OutputContext,
) -> OutputStates:
    return OutputStates(
        hidden_states=hidden_states,
        output_layer=output_layer,
        output_weight=output_weight,
        rows=context.loss_rows.rows,
        group=context.group,
    )


def _loss_inputs(rows: LossRows, objective: ops.Objective) -> dict[str, Any]:
    """The loss's arguments that stand in the examples."""
    names = ["token_weights", "advantages", "old_logprobs"]
    if objective.needs_teacher_logprobs:
        names += ["teacher_logprobs"]
    if objective.needs_teacher_topk:  # else their log-probs would be computed for nothing
        names += ["teacher_topk_ids", "teacher_topk_logprobs"]
    inputs = {name: getattr(rows, name) for name in names}
    missing = [name for name, values in inputs.items() if values is None]
    if missing:
        raise ValueError(
            f"the objective needs {', '.join(missing)}, but the training examples have none"
        )
    return inputs
