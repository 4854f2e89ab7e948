"""The one differentiable collective that a vocabulary-parallel loss needs."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverRanks(torch.autograd.Function):
    """Forward: all-reduce (sum). Backward: identity.

    After the all-reduce every rank goes on to compute the same loss from the same numbers, and
    starts its own backward pass from it. The gradient that arrives here is therefore already that
    of the whole loss with respect to the sum, on every rank; and the sum depends on this rank's
    summand with derivative 1. Reducing the gradients once more, as would be right if each rank held
    a loss of its own, would count the one loss once per rank.
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def sum_over_ranks(partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of ``partial`` over the group, for a loss that every rank of the group computes whole.

    Args:
        partial: this rank's summand, any shape.
        group: process group, or None for a single process.

    Returns:
        The sum, the same on every rank; its gradient reaches ``partial`` unchanged.
    """
    if group is None:
        return partial
    return _SumOverRanks.apply(partial, group)


@torch.no_grad()
def max_over_ranks(partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise maximum of ``partial`` over the group; carries no gradient."""
    if group is None:
        return partial.detach()
    total = partial.detach().clone()
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=group)
    return total
