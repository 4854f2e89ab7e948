"""The method as pure functions on tensors: steps, weights, advantages, losses and divergences.

Nothing here knows an engine, a process group or a file. Tensors are padded ``[B, T]`` (samples by
tokens) with a ``loss_mask``; what lies outside the mask never matters, NaN included.
"""

from sod_mcore.algorithm.advantages import (
    distillation_advantages,
    gated_distillation_advantages,
    grpo_advantages,
)
from sod_mcore.algorithm.divergences import (
    k1_divergence,
    k2_divergence,
    k3_divergence,
    topk_divergence,
)
from sod_mcore.algorithm.finite import floor_logprobs
from sod_mcore.algorithm.policy_loss import PolicyLoss, policy_loss
from sod_mcore.algorithm.steps import index_steps
from sod_mcore.algorithm.weights import StepWeights, compute_step_weights

__all__ = [
    "PolicyLoss",
    "StepWeights",
    "compute_step_weights",
    "distillation_advantages",
    "floor_logprobs",
    "gated_distillation_advantages",
    "grpo_advantages",
    "index_steps",
    "k1_divergence",
    "k2_divergence",
    "k3_divergence",
    "policy_loss",
    "topk_divergence",
]
