"""The same numbers from transformers' models and plain autograd, one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sod_mcore.ops import Objective
from sod_mcore.student.examples import TrainingExample


@dataclass(frozen=True)
class Expected:
    """Losses are means over all tokens of the mask; gradients are of these means.

    Attributes:
        logprobs: per example float32 ``[T - 1]``, of tokens 1 to T - 1.
    """

    logprobs: list[torch.Tensor]
    sft_loss: float
    sft_gradients: dict[str, torch.Tensor]
    objective_loss: float
    objective_gradients: dict[str, torch.Tensor]


def expected_results(
    folder: Path, examples: list[TrainingExample], objective: Objective
) -> Expected:
    """Compute everything in float32 with Hugging Face's model in ``folder``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    distributions = [
        model(torch.from_numpy(example.token_ids).long()[None]).logits[0, :-1].log_softmax(-1)
        for example in examples
    ]
    logprobs = [
        table.gather(1, torch.from_numpy(example.token_ids[1:]).long()[:, None])[:, 0]
        for table, example in zip(distributions, examples, strict=True)
    ]
    masks = [torch.from_numpy(example.loss_mask[1:]) for example in examples]
    num_tokens = sum(int(mask.sum()) for mask in masks)
    sft_loss = (
        sum(-(values * mask).sum() for values, mask in zip(logprobs, masks, strict=True))
        / num_tokens
    )
    objective_loss = (
        sum(
            (_token_losses(values, table, example, objective) * mask).sum()
            for values, table, example, mask in zip(
                logprobs, distributions, examples, masks, strict=True
            )
        )
        / num_tokens
    )
    assert isinstance(sft_loss, torch.Tensor)
    assert isinstance(objective_loss, torch.Tensor)
    return Expected(
        logprobs=[values.detach() for values in logprobs],
        sft_loss=sft_loss.item(),
        sft_gradients=_gradients(model, sft_loss),
        objective_loss=objective_loss.item(),
        objective_gradients=_gradients(model, objective_loss),
    )


def _token_losses(
    logprobs: torch.Tensor, table: torch.Tensor, example: TrainingExample, objective: Objective
) -> torch.Tensor:
    """PPO with dual clip (arXiv 1912.09729), weighted k3, and an entropy bonus; ``[T - 1]``."""
    arrays = (
        example.advantages,
        example.old_logprobs,
        example.teacher_logprobs,
        example.token_weights,
    )
    assert all(array is not None for array in arrays)
    advantages, old, teacher, weights = (
        torch.from_numpy(array[1:]) for array in arrays if array is not None
    )
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    assert objective.dual_clip is not None
    bound = -advantages * objective.dual_clip
    policy = torch.where(advantages < 0, torch.minimum(policy, bound), policy)
    difference = teacher - logprobs
    k3 = difference.exp() - 1 - difference
    entropy = -(table.exp() * table).sum(-1)
    return (
        policy + objective.k3_coefficient * weights * k3 - objective.entropy_coefficient * entropy
    )


def _gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
