"""What a loss and its gradient are in float64, and how far an implementation is from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sod_mcore.ops import Objective, StepWeightedKL, reference

Operation = Callable[..., StepWeightedKL]


@dataclass(frozen=True)
class Problem:
    """Logits and everything else that the loss takes, seeded."""

    logits: Tensor
    vocab_size: int
    temperature: float
    objective: Objective
    arguments: dict[str, Any]
    upstream: Tensor


def make_problem(
    objective: Objective,
    *,
    num_rows: int = 5,
    vocab_size: int = 1000,
    padding: int = 24,
    top_k: int = 7,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    seed: int = 0,
    logits: Tensor | None = None,
    teacher_scale: float = 2.0,
) -> Problem:
    """A random problem; ``logits [N, vocab_size]`` may be given instead of drawn."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if logits is None:
        logits = 2.5 * normal(num_rows, vocab_size)
    num_rows, vocab_size = logits.shape
    padded = torch.cat([logits, torch.full((num_rows, padding), torch.nan)], dim=1).to(dtype)
    noise = teacher_scale * normal(num_rows, vocab_size)
    teacher = (logits.clamp(min=-50) + noise).log_softmax(-1)
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    topk_logprobs, topk_ids = teacher.topk(top_k, dim=-1)
    if top_k:
        targets[0] = topk_ids[0, 0]
    if top_k > 2:
        topk_logprobs[1, 2] = -torch.inf
        topk_ids[2, 1] = -1
    token_weights = 1.2 * torch.rand(num_rows, generator=generator)
    advantages = 2.0 * normal(num_rows)
    token_weights[1], advantages[1] = 0.0, 0.0  # rows whose teacher, or everything, is silent
    token_weights[-1] = 0.0
    current = padded[:, :vocab_size].double().div(temperature).log_softmax(-1)
    sampled = current.gather(1, targets[:, None])[:, 0].float()
    return Problem(
        logits=padded,
        vocab_size=vocab_size,
        temperature=temperature,
        objective=objective,
        arguments={
            "targets": targets,
            "token_weights": token_weights,
            "advantages": advantages,
            "old_logprobs": sampled + 0.2 * normal(num_rows),
            "teacher_logprobs": (sampled + 0.5 * normal(num_rows)).clamp(max=0),
            "teacher_topk_ids": topk_ids.int(),
            "teacher_topk_logprobs": topk_logprobs,
        },
        upstream=torch.linspace(-1, 2, num_rows),
    )


def apply(operation: Operation, problem: Problem, logits: Tensor, **options: Any) -> StepWeightedKL:
    """The operation on some logits, with everything else as the problem has it."""
    return operation(
        logits,
        vocab_size=problem.vocab_size,
        group=None,
        temperature=problem.temperature,
        objective=problem.objective,
        **problem.arguments,
        **options,
    )


def overwritable(logits: Tensor) -> Tensor:
    """The same memory as what an operation has made: no leaf, and no view of one."""
    return logits.detach().add_(torch.zeros((), dtype=logits.dtype, requires_grad=True))


def solve(operation: Operation, problem: Problem, **options: Any) -> tuple[StepWeightedKL, Tensor]:
    """Result and gradient of the logits."""
    logits = problem.logits.clone().requires_grad_()
    # No leaf, so that it may be overwritten.
    result = apply(operation, problem, logits * 1, **options)
    (result.token_loss * problem.upstream.to(result.token_loss.dtype)).sum().backward()
    assert logits.grad is not None
    return result, logits.grad


def solve_in_float64(problem: Problem) -> tuple[StepWeightedKL, Tensor]:
    """The eager definition on the same numbers in float64."""
    double = Problem(
        logits=problem.logits.double(),
        vocab_size=problem.vocab_size,
        temperature=problem.temperature,
        objective=problem.objective,
        arguments={
            name: values.double() if values is not None and values.is_floating_point() else values
            for name, values in problem.arguments.items()
        },
        upstream=problem.upstream.double(),
    )
    return solve(reference.step_weighted_kl, double)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64."""
    scale = expected.double().norm()
    return float((actual.double() - expected.double()).norm().detach() / scale.clamp(min=1e-12))


def value_error(actual: Tensor, expected: Tensor) -> float:
    """Largest ``|a - b| / (1 + |b|)``; entries that are -inf in both do not count."""
    if not actual.numel():
        return 0.0
    both_absent = torch.isneginf(actual) & torch.isneginf(expected)
    gap = (actual.double() - expected.double()).abs() / (1 + expected.double().abs())
    return float(gap.masked_fill(both_absent, 0.0).detach().max())
