"""The fused operations: logits are read once forward, and read and overwritten once backward.

Nothing of the logits' size is made beside them (where they may be overwritten), O(N K) is saved,
and the tensor-parallel ranks talk once. The arithmetic is csrc/'s; the definition that it is tested
against is :mod:`sod_mcore.ops.reference`, with the same signatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sod_mcore.ops.arguments import (
    LossInputs,
    check_kernel_logits,
    check_logprob_arguments,
    check_loss_arguments,
)
from sod_mcore.ops.kernels import GradientCoefficients, Kernels, TokenIds, result_of
from sod_mcore.ops.objective import Objective
from sod_mcore.ops.result import StepWeightedKL


def vocab_parallel_logprobs(
    extension: ModuleType,
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    overwrite_logits: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`sod_mcore.ops.reference.vocab_parallel_logprobs` on the extension's kernels."""
    shard = check_logprob_arguments(
        logits,
        targets,
        vocab_size=vocab_size,
        temperature=temperature,
        group=group,
        validate=validate,
    )
    check_kernel_logits(logits, overwrite_logits=overwrite_logits)
    kernels = Kernels(extension, shard, 1.0 / temperature)
    logprobs, entropy = _Logprobs.apply(logits, targets.contiguous(), kernels, overwrite_logits)
    return logprobs, entropy


def step_weighted_kl(
    extension: ModuleType,
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    temperature: float,
    objective: Objective,
    overwrite_logits: bool = False,
    validate: bool = False,
    **inputs_of_rows: Tensor | None,
) -> StepWeightedKL:
    """:func:`sod_mcore.ops.reference.step_weighted_kl` on the extension's kernels."""
    inputs = LossInputs(targets, **inputs_of_rows).detach()  # type: ignore[arg-type]
    shard = check_loss_arguments(
        logits,
        inputs,
        vocab_size=vocab_size,
        temperature=temperature,
        group=group,
        objective=objective,
        validate=validate,
    )
    check_kernel_logits(logits, overwrite_logits=overwrite_logits)
    call = _Call(Kernels(extension, shard, 1.0 / temperature), inputs, objective, overwrite_logits)
    return result_of(_StepWeightedKL.apply(logits, call), objective)


@dataclass(frozen=True)
class _Call:
    """The arguments of one call beside the logits."""

    kernels: Kernels
    inputs: LossInputs
    objective: Objective
    overwrite_logits: bool


class _Logprobs(torch.autograd.Function):
    """Log-prob of the target and entropy of each row, both differentiable."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, kernels: Kernels, overwrite_logits: bool
    ) -> tuple[Tensor, Tensor]:
        ids = TokenIds(targets)
        statistics = kernels.summed_statistics(logits, ids)
        result, _ = kernels.token_loss(statistics, ids, Objective(), None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, statistics)
        ctx.kernels, ctx.overwrite_logits, ctx.is_consumed = kernels, overwrite_logits, False
        return result.logprobs, result.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None
        _require_first_pass(ctx)
        logits, targets, statistics = ctx.saved_tensors
        ids = TokenIds(targets)
        coefficients = ctx.kernels.logprob_coefficients(
            statistics, ids, grad_logprobs, grad_entropy
        )
        return _gradient(ctx, logits, ids, coefficients, None), None, None, None


class _StepWeightedKL(torch.autograd.Function):
    """The token loss, differentiable, and the values reported beside it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call) -> tuple[Tensor | None, ...]:
        inputs, kernels = call.inputs, call.kernels
        ids = TokenIds.of(inputs)
        statistics = kernels.summed_statistics(logits, ids)
        result, coefficients = kernels.token_loss(statistics, ids, call.objective, inputs)
        reported = result.reported
        ctx.mark_non_differentiable(*(values for values in reported if values is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            logits,
            ids.targets,
            ids.topk_ids,
            ids.teacher_topk_logprobs,
            coefficients.dense,
            coefficients.sparse,
        )
        ctx.kernels, ctx.overwrite_logits, ctx.is_consumed = kernels, call.overwrite_logits, False
        return result.token_loss, *reported

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_token_loss: Tensor | None, *unused: Tensor | None
    ) -> tuple[Tensor | None, None]:
        if grad_token_loss is None:
            return None, None
        _require_first_pass(ctx)
        logits, targets, topk_ids, teacher_topk_logprobs, dense, sparse = ctx.saved_tensors
        ids = TokenIds(targets, topk_ids, teacher_topk_logprobs)
        coefficients = GradientCoefficients(dense, sparse)
        return _gradient(ctx, logits, ids, coefficients, grad_token_loss), None


def _require_first_pass(ctx: Any) -> None:
    if ctx.is_consumed:
        raise RuntimeError(
            "logits were differentiated twice with overwrite_logits=True: the first backward pass "
            "wrote the gradient over them. Pass overwrite_logits=False"
        )


def _gradient(
    ctx: Any,
    logits: Tensor,
    ids: TokenIds,
    coefficients: GradientCoefficients,
    upstream: Tensor | None,
) -> Tensor:
    """The logits' gradient, in their own memory where that is allowed."""
    gradient = logits.detach() if ctx.overwrite_logits else torch.empty_like(logits)
    ctx.kernels.write_gradient(logits, ids, coefficients, upstream, gradient)
    if ctx.overwrite_logits:
        ctx.is_consumed = True
        # Whoever else saved the logits for a backward pass of its own is told by autograd.
        torch.autograd.graph.increment_version(logits)
    return gradient
