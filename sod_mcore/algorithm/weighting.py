"""How much of the teacher's signal each step gets: one named rule, or a function of the user's.

The rules are those of the SOD paper (arXiv 2605.07725) and of its ablations. Each maps what is
known of the steps of a batch to weights ``w_k``; ``algorithm.weighting`` names one of them, or a
function as ``package.module:function`` with the same signature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sod_mcore.algorithm.weights import (
    StepWeights,
    spread_over_tokens,
    weights_from_divergence,
)
from sod_mcore.config import AlgorithmConfig
from sod_mcore.user_functions import import_function


@dataclass(frozen=True)
class StepFacts:
    """What a rule may look at; B samples, K the largest number of steps of one.

    Attributes:
        divergence: float ``[B, K]`` ``d_k`` in nats, NaN past a sample's last step.
        lengths: int64 ``[B, K]`` tokens in the loss, 0 past the last step.
        first_failure: int64 ``[B]`` the step whose tool call was the first to fail, 0-based; K or
            more where none did.
        group_advantages: float ``[B]`` the group-relative advantage of each sample.
    """

    divergence: Tensor
    lengths: Tensor
    first_failure: Tensor
    group_advantages: Tensor

    @property
    def steps_since_failure(self) -> Tensor:
        """int64 ``[B, K]``: steps since the first failed call, 0 up to and including it."""
        step = torch.arange(self.divergence.shape[1], device=self.divergence.device)
        return (step - self.first_failure[:, None]).clamp(min=0)


WeightRule = Callable[[StepFacts, AlgorithmConfig], Tensor]
"""``(facts, algorithm settings) -> weights [B, K]``; what stands past the last step is ignored."""


def sod(facts: StepFacts, config: AlgorithmConfig) -> Tensor:
    """``min((d_1 + epsilon) / (d_k + epsilon), 1 + delta)``, ``w_1 = 1`` (Eq. 7).

    ``d_1`` is at least ``weight_first_divergence_floor``: where the first step all but agrees with
    the teacher, it would mute every later one.
    """
    return weights_from_divergence(
        facts.divergence,
        config.weight_epsilon,
        config.weight_delta,
        first_floor=config.weight_first_divergence_floor,
    )


def uniform(facts: StepFacts, config: AlgorithmConfig) -> Tensor:
    """1: plain on-policy distillation."""
    return torch.ones_like(facts.divergence)


def failure_decay(facts: StepFacts, config: AlgorithmConfig) -> Tensor:
    """``0.9^(k - k_err)`` after the first failed tool call, 1 before (the paper's heuristic)."""
    return config.weight_failure_decay ** facts.steps_since_failure.to(facts.divergence.dtype)


def failure_mask(facts: StepFacts, config: AlgorithmConfig) -> Tensor:
    """0 after the first failed tool call, 1 before."""
    return (facts.steps_since_failure == 0).to(facts.divergence.dtype)


def reward_gate(facts: StepFacts, config: AlgorithmConfig) -> Tensor:
    """``gate_max * sigmoid(-A_i)`` for all steps of a sample with group advantage ``A_i``: the form
    that preceded step-wise weights, with its ``gamma`` of 1 and least share of 0."""
    gate = config.weight_gate_max * torch.sigmoid(-facts.group_advantages)
    return gate[:, None].expand_as(facts.divergence).to(facts.divergence.dtype)


RULES: dict[str, WeightRule] = {
    rule.__name__: rule for rule in (sod, uniform, failure_decay, failure_mask, reward_gate)
}


def find_rule(name: str) -> WeightRule:
    """The rule that ``algorithm.weighting`` names.

    Raises:
        ConfigError: there is none of that name, or it cannot be imported.
    """
    if name in RULES:
        return RULES[name]
    choices = f"one of {', '.join(RULES)}, or a function of yours as package.module:function"
    return import_function("algorithm.weighting is", name, choices)


def shrunk_divergence(steps: StepWeights, prior_tokens: float) -> Tensor:
    """``(n_k d_k + n_0 d) / (n_k + n_0)`` ``[B, K]``: few tokens say little about a step.

    ``d`` is the mean over all loss tokens of the sample, ``n_0`` the prior's tokens.
    """
    divergence, lengths = steps.step_divergence, steps.step_lengths
    if prior_tokens == 0.0:
        return divergence
    sums = divergence.nan_to_num() * lengths
    mean = sums.sum(1, keepdim=True) / lengths.sum(1, keepdim=True).clamp(min=1)
    shrunk = (sums + prior_tokens * mean) / (lengths + prior_tokens)
    return shrunk.masked_fill(lengths == 0, torch.nan)


def apply_rule(steps: StepWeights, facts: StepFacts, config: AlgorithmConfig) -> StepWeights:
    """The same steps with the weights of the configured rule.

    Raises:
        ValueError: the rule gave weights of a wrong shape, negative ones, or not finite ones.
    """
    weights = find_rule(config.weighting)(facts, config)
    is_step = steps.step_lengths > 0
    if weights.shape != is_step.shape or not bool(
        ((weights >= 0) & weights.isfinite())[is_step].all()
    ):
        raise ValueError(
            f"algorithm.weighting={config.weighting} must give finite weights of at least 0, of "
            f"shape {tuple(is_step.shape)}; it gave {tuple(weights.shape)}, from "
            f"{float(weights.min()) if weights.numel() else 'nothing'} on"
        )
    weights = weights.to(steps.token_weights.dtype).masked_fill(~is_step, torch.nan)
    token_weights = spread_over_tokens(weights, steps.step_index)
    return dataclasses.replace(steps, step_weights=weights, token_weights=token_weights)
