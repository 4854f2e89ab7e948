"""What the fused op is measured against: the same loss as one writes it in torch, and cross
entropies, which compute less.

Each contestant makes the gradient of its summed loss by the logits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import Contestant
from sod_mcore import ops
from sod_mcore.ops import Objective

OBJECTIVE = Objective(
    k3_coefficient=0.1, topk_divergence="reverse_kl", topk_coefficient=1.0, entropy_coefficient=0.01
)
TOP_K = 64


@dataclass(frozen=True)
class Problem:
    """Logits ``[N, V]`` and all that the loss takes beside them."""

    logits: Tensor
    arguments: dict[str, Tensor]

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[1]


def make_problem(
    num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Random logits of a spread as trained models have, and a teacher near them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    logits = (2.5 * normal(num_rows, vocab_size)).to(dtype)
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator, device=device)
    sampled = torch.empty(num_rows, device=device)
    topk_ids = torch.empty(num_rows, TOP_K, dtype=torch.int32, device=device)
    topk_logprobs = torch.empty(num_rows, TOP_K, device=device)
    for rows in torch.arange(num_rows, device=device).split(256):
        logprobs = logits[rows].float().log_softmax(-1)
        sampled[rows] = logprobs.gather(1, targets[rows, None])[:, 0]
        teacher = (logprobs + normal(*logprobs.shape)).log_softmax(-1)
        values, ids = teacher.topk(TOP_K)
        topk_logprobs[rows], topk_ids[rows] = values, ids.int()
    return Problem(
        logits,
        {
            "targets": targets,
            "token_weights": torch.rand(num_rows, generator=generator, device=device),
            "advantages": normal(num_rows),
            "old_logprobs": sampled + 0.1 * normal(num_rows),
            "teacher_logprobs": (sampled + 0.5 * normal(num_rows)).clamp(max=0),
            "teacher_topk_ids": topk_ids,
            "teacher_topk_logprobs": topk_logprobs,
        },
    )


def contestants(problem: Problem, device: torch.device) -> dict[str, Contestant]:
    """By name, ours first; all read their logits from one buffer, which some overwrite."""
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "fused (ours)": lambda logits: _gradient(fused_loss(problem, logits).sum(), logits),
        "eager torch, same loss": lambda logits: _gradient(plain_loss(logits, problem), logits),
    }
    compiled = torch.compile(plain_loss, dynamic=False)
    runs["torch.compile, same loss"] = lambda logits: _gradient(compiled(logits, problem), logits)
    runs["log_softmax + gather"] = lambda logits: _gradient(
        -logits.float().log_softmax(-1).gather(1, problem.arguments["targets"][:, None]).sum(),
        logits,
    )
    runs |= _megatron(problem)
    if device.type == "cuda":
        runs |= _liger(problem) | _quack(problem)
    # One row more, which one of them wants.
    buffer = torch.cat([torch.empty_like(problem.logits), problem.logits[-1:]])
    current: list[Tensor] = []

    def prepare() -> None:
        """The logits anew in the same memory, as what an operation has made: no leaf."""
        logits = buffer[: len(problem.logits)].copy_(problem.logits)
        zero = torch.zeros((), dtype=logits.dtype, device=device, requires_grad=True)
        current[:] = [logits.detach().add_(zero)]

    def run_on_current(run: Callable[[Tensor], Tensor]) -> Tensor:
        return run(current[0])

    return {name: Contestant(prepare, partial(run_on_current, run)) for name, run in runs.items()}


def fused_loss(problem: Problem, logits: Tensor) -> Tensor:
    """The token losses of our op, their gradient in the place of the logits."""
    return ops.step_weighted_kl(
        logits,
        vocab_size=problem.vocab_size,
        group=None,
        temperature=1.0,
        objective=OBJECTIVE,
        overwrite_logits=True,
        **problem.arguments,
    ).token_loss


def plain_loss(logits: Tensor, problem: Problem) -> Tensor:
    """The same loss without care for memory, as one writes it first."""
    given = problem.arguments
    logprobs = logits.float().log_softmax(-1)
    sampled = logprobs.gather(1, given["targets"][:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)

    ratio = (sampled - given["old_logprobs"]).exp()
    advantages = given["advantages"]
    clipped = ratio.clamp(1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    bound = torch.where(advantages < 0, -advantages * 3.0, torch.inf)
    policy = torch.minimum(policy, bound)

    gap = given["teacher_logprobs"] - sampled
    k3 = torch.expm1(gap) - gap

    topk = logprobs.gather(1, given["teacher_topk_ids"].long())
    teacher = given["teacher_topk_logprobs"]
    rest = torch.log1p(-topk.exp().sum(-1))
    teacher_rest = torch.log1p(-teacher.exp().sum(-1))
    reverse_kl = (topk.exp() * (topk - teacher)).sum(-1) + rest.exp() * (rest - teacher_rest)

    distillation = OBJECTIVE.k3_coefficient * k3 + OBJECTIVE.topk_coefficient * reverse_kl
    weighted = given["token_weights"] * distillation
    return (policy + weighted - OBJECTIVE.entropy_coefficient * entropy).sum()


def _megatron(problem: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """Cross entropies of Megatron-Core: no entropy, no teacher, no clip."""
    from megatron.core.fusions.fused_cross_entropy import (
        fused_vocab_parallel_cross_entropy,
    )
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    group = dist.group.WORLD
    targets = problem.arguments["targets"][:, None]

    def run(function: Any, logits: Tensor) -> Tensor:
        # [s, b, V]; a leaf of that shape, for one of them writes into its input.
        logits = logits.detach()[:, None, :].requires_grad_()
        return _gradient(function(logits, targets, tp_group=group).sum(), logits)

    return {
        "Megatron-Core cross entropy": lambda logits: run(vocab_parallel_cross_entropy, logits),
        "Megatron-Core fused cross entropy": lambda logits: run(
            fused_vocab_parallel_cross_entropy, logits
        ),
    }


def _liger(problem: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """Liger-Kernel's cross entropy and GRPO loss, if installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    targets = problem.arguments["targets"]

    def cross_entropy(logits: Tensor) -> Tensor:
        loss = LigerCrossEntropyFunction.apply(logits, targets, None, -100, 0.0, 0.0, "sum")[0]
        return _gradient(loss, logits)

    def grpo(logits: Tensor) -> Tensor:
        # It takes [B, L + 1, V] and leaves the last position out: the row behind the others.
        shape = (1, logits.shape[0] + 1, logits.shape[1])
        logits = logits.detach().as_strided(shape, (0, *logits.stride())).requires_grad_()
        old = problem.arguments["old_logprobs"][None]
        loss = GrpoLossFunction.apply(
            logits, old, None, targets[None], None, problem.arguments["advantages"][:1],
            1.0, 0.0, 0.2, 0.28, True,
        )[0]  # fmt: skip
        return _gradient(loss.sum(), logits)

    return {"Liger cross entropy": cross_entropy, "Liger GRPO loss": grpo}


def _quack(problem: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """quack's cross entropy, if installed."""
    if importlib.util.find_spec("quack") is None:
        return {}
    from quack.cross_entropy import cross_entropy

    targets = problem.arguments["targets"]
    return {
        "quack cross entropy": lambda logits: _gradient(
            cross_entropy(logits, targets, inplace_backward=True, reduction="none").sum(), logits
        )
    }


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]
