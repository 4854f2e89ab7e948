"""The loss straight from hidden states: output layer and loss in one operation, chunk by chunk.

The logits of a chunk of rows are computed, read, turned into their own gradient in place, and used
for the gradients of hidden states and weight, all in the forward pass: three matrix products and no
recomputation, and no logits in memory but those of one chunk. What arrives backward can then
only scale the gradients, so it has to be one number for all tokens: a loss that is a sum of token
losses, times a constant.

When to take it: where the logits of all rows do not fit. It holds a float32 gradient of the weight
meanwhile: at h = 1024 it took 1.2 times the memory of all logits of 4,096 rows and two thirds of
that of 8,192, in 1.06 to 1.18 times their time (bf16 on two CPU cores, chunks of 1,024 rows;
benchmarks/output_head.py).
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
    DEFAULT_CHUNK_ROWS,
    LossInputs,
    check_kernel_dtype,
    check_linear_arguments,
    check_logprob_arguments,
    check_loss_arguments,
)
from sod_mcore.ops.kernels import Kernels, TokenIds, TokenLoss, result_of
from sod_mcore.ops.objective import Objective
from sod_mcore.ops.result import StepWeightedKL


def linear_vocab_parallel_logprobs(
    extension: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    logits_dtype: torch.dtype | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`sod_mcore.ops.reference.linear_vocab_parallel_logprobs` on the extension's kernels.

    The entropy is not differentiable here.
    """
    dtype = check_linear_arguments(hidden, weight, chunk_rows, logits_dtype)
    check_kernel_dtype("hidden", hidden.dtype)
    shard = check_logprob_arguments(
        _empty_logits(hidden, weight, dtype),
        targets,
        vocab_size=vocab_size,
        temperature=temperature,
        group=group,
        validate=validate,
    )
    call = _Call(
        kernels=Kernels(extension, shard, 1.0 / temperature),
        ids=TokenIds(targets.contiguous()),
        inputs=None,
        objective=Objective(),
        chunk_rows=chunk_rows,
        logits_dtype=dtype,
        weight=weight,
        wants_gradient=_wants_gradient(hidden, weight),
    )
    logprobs, _, entropy, *_ = _LinearLoss.apply(hidden, weight, call)
    return logprobs, entropy


def linear_step_weighted_kl(
    extension: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    temperature: float,
    objective: Objective,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    logits_dtype: torch.dtype | None = None,
    validate: bool = False,
    **inputs_of_rows: Tensor | None,
) -> StepWeightedKL:
    """:func:`sod_mcore.ops.reference.linear_step_weighted_kl` on the extension's kernels."""
    dtype = check_linear_arguments(hidden, weight, chunk_rows, logits_dtype)
    check_kernel_dtype("hidden", hidden.dtype)
    inputs = LossInputs(targets, **inputs_of_rows).detach()  # type: ignore[arg-type]
    shard = check_loss_arguments(
        _empty_logits(hidden, weight, dtype),
        inputs,
        vocab_size=vocab_size,
        temperature=temperature,
        group=group,
        objective=objective,
        validate=validate,
    )
    call = _Call(
        kernels=Kernels(extension, shard, 1.0 / temperature),
        ids=TokenIds.of(inputs),
        inputs=inputs,
        objective=objective,
        chunk_rows=chunk_rows,
        logits_dtype=dtype,
        weight=weight,
        wants_gradient=_wants_gradient(hidden, weight),
    )
    return result_of(_LinearLoss.apply(hidden, weight, call), objective)


@dataclass(frozen=True)
class _Call:
    """One call beside the two tensors that autograd has to see."""

    kernels: Kernels
    ids: TokenIds
    inputs: LossInputs | None  # None: the value is the log-prob of the target
    objective: Objective
    chunk_rows: int
    logits_dtype: torch.dtype
    weight: Tensor  # the parameter itself, with Megatron's attributes
    wants_gradient: bool


class _LinearLoss(torch.autograd.Function):
    """``value [N]``, differentiable up to one factor, and the reported values."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, call: _Call) -> tuple[Tensor | None, ...]:
        gradients = _Gradients.of(hidden, weight) if call.wants_gradient else None
        projection = _projection(weight, call.logits_dtype)
        parts = []
        for start in range(0, max(hidden.shape[0], 1), call.chunk_rows):
            rows = slice(start, min(start + call.chunk_rows, hidden.shape[0]))
            parts.append(_run_chunk(call, hidden, weight, projection, rows, gradients))
        result = _join(parts)
        value = result.logprobs.clone() if call.inputs is None else result.token_loss
        reported = result.reported
        ctx.mark_non_differentiable(*(values for values in reported if values is not None))
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.gradients = call.weight, gradients
        return value, *reported

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_value: Tensor | None, *unused: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if grad_value is None:
            return None, None, None
        if ctx.gradients is None:
            raise RuntimeError(
                "the chunked output layer was differentiated twice, but its gradients are kept "
                "for one backward pass only; use step_weighted_kl on logits"
            )
        factor = _only_value(grad_value)
        gradients, ctx.gradients = ctx.gradients, None
        hidden_gradient = gradients.hidden.mul_(factor) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return hidden_gradient, None, None
        return hidden_gradient, _deliver(gradients.weight.mul_(factor), ctx.weight), None


@dataclass(frozen=True)
class _Gradients:
    """Of the sum of all values; filled chunk by chunk."""

    hidden: Tensor  # [N, h], this rank's summand
    weight: Tensor  # [V/tp, h] float32

    @staticmethod
    def of(hidden: Tensor, weight: Tensor) -> _Gradients:
        return _Gradients(
            hidden=torch.zeros_like(hidden),
            weight=torch.zeros(weight.shape, dtype=torch.float32, device=weight.device),
        )


def _run_chunk(
    call: _Call,
    hidden: Tensor,
    weight: Tensor,
    projection: Tensor,
    rows: slice,
    gradients: _Gradients | None,
) -> TokenLoss:
    """Values of some rows; adds their gradients."""
    kernels, ids = call.kernels, call.ids.rows(rows)
    logits = _product(hidden[rows].to(projection.dtype), projection, call.logits_dtype)
    statistics = kernels.summed_statistics(logits, ids)
    inputs = None if call.inputs is None else call.inputs.rows(rows)
    result, coefficients = kernels.token_loss(statistics, ids, call.objective, inputs)
    if gradients is None:
        return result
    if inputs is None:
        ones = torch.ones_like(result.logprobs)
        coefficients = kernels.logprob_coefficients(statistics, ids, ones, None)
    kernels.write_gradient(logits, ids, coefficients, None, logits)
    logits_gradient = logits.to(hidden.dtype)
    torch.mm(logits_gradient, weight, out=gradients.hidden[rows])
    if hidden.dtype == torch.float32:
        gradients.weight.addmm_(logits_gradient.T, hidden[rows])
    else:
        dtype = torch.float32 if hidden.is_cuda else hidden.dtype
        gradients.weight.add_(_product(logits_gradient.T, hidden[rows], dtype))
    return result


def _projection(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``[h, V/tp]`` of the product that makes logits.

    CUDA multiplies bf16 numbers and gives their float32 sums; the CPU has to have float32 numbers,
    a copy of the weight.
    """
    return weight.T if weight.is_cuda else weight.to(dtype).T


def _product(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product, rounded to ``dtype`` once."""
    if first.dtype == dtype:
        return first @ second
    return torch.mm(first, second, out_dtype=dtype)


def _join(parts: list[TokenLoss]) -> TokenLoss:
    """The chunks' results one after another."""
    if len(parts) == 1:
        return parts[0]

    def cat(name: str, dim: int = 0) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim)

    return TokenLoss(
        token_loss=cat("token_loss"),
        logprobs=cat("logprobs"),
        entropy=cat("entropy"),
        ratio=cat("ratio"),
        is_clipped=cat("is_clipped"),
        terms=cat("terms", dim=1),
        topk_logprobs=None if parts[0].topk_logprobs is None else cat("topk_logprobs"),
    )


def _only_value(gradient: Tensor) -> Tensor:
    """The one number that a gradient ``[N]`` repeats, a scalar tensor."""
    if gradient.numel() == 0:
        return gradient.new_ones(())
    # The backward of a sum repeats a number without storing it twice: nothing to compare then.
    if gradient.stride(0) != 0 and not bool((gradient == gradient[0]).all()):
        raise RuntimeError(
            "the chunked output layer got a different gradient for each token: its own gradients "
            "were computed in the forward pass, for a plain sum of the token losses. Weigh tokens "
            "by token_weights and advantages, or use step_weighted_kl on logits"
        )
    return gradient[0]


def _deliver(gradient: Tensor, weight: Tensor) -> Tensor:
    """Hand the weight's gradient over as Megatron-Core's fused linear layers do.

    A parameter in a gradient buffer has ``main_grad``; the gradient is added there in float32, and
    ``grad_added_to_main_grad`` tells the hook that follows so. That hook wants a gradient all the
    same: one whose values do not matter, or zeros for a weight that another layer shares
    (``zero_out_wgrad``), since the other layer's gradient is added to it.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None or not hasattr(weight, "grad_added_to_main_grad"):
        return gradient.to(weight.dtype)
    main_grad.add_(gradient)
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)


def _wants_gradient(hidden: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)


def _empty_logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Stands for the logits in the checks: their shape, dtype and device, without memory."""
    return hidden.new_empty(1, dtype=dtype).as_strided((hidden.shape[0], weight.shape[0]), (0, 0))
