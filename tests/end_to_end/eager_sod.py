"""One SOD update's loss and gradient in plain transformers and eager torch, from the formulas.

Written from the papers, one trajectory at a time, and sharing no code with the package: the loss of
``pretrain_sod.py`` on any layout must agree with it. The network is float32; what is made of its
logits is float64, because torch's float32 ``log_softmax`` alone can move a gradient by 1e-5 of its
largest entry.

Formulas: step weights and advantages from SOD (arXiv 2605.07725, Eq. 2 and 6 to 10), one clip bound
for each side from DAPO (2503.14476), the second bound for negative advantages from 1912.09729.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from sod_mcore.config import AlgorithmConfig
from sod_mcore.trajectory import Trajectory

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class EagerUpdate:
    """Means are over all sampled tokens; gradients are of the loss, float64, by parameter name.

    Attributes:
        ratios: ``pi / pi_old`` of every sampled token.
    """

    loss: float
    gradients: dict[str, torch.Tensor]
    clip_fraction: float
    mean_step_weight: float
    ratios: Floats

    @property
    def gradient_norm(self) -> float:
        """Euclidean norm over all parameters."""
        return float(sum(float(g.square().sum()) for g in self.gradients.values()) ** 0.5)


def eager_update(
    folder: Path,
    trajectories: Sequence[Trajectory],
    config: AlgorithmConfig,
    weights: torch.dtype = torch.float32,
) -> EagerUpdate:
    """Loss and gradient of one mini-batch that holds all ``trajectories``.

    Args:
        folder: Hugging Face folder of the student.
        trajectories: scored ones, whole groups.
        config: coefficients; distillation as an advantage or none, sod weighting, no TIS.
        weights: what the weights are rounded to before; the computation is float32.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=weights).float()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    num_tokens = sum(int(t.loss_mask.sum()) for t in trajectories)
    group_advantages = _group_advantages(trajectories)
    loss, num_clipped, weights_of_steps, ratios = 0.0, 0, [], []
    for trajectory, group_advantage in zip(trajectories, group_advantages, strict=True):
        table, logprobs = _sampled_distributions(model, trajectory)
        old = logprobs.detach().numpy()
        if config.old_logprobs == "rollout":
            old = trajectory.rollout_logprobs[trajectory.loss_mask].astype(np.float64)
        teacher = trajectory.teacher_logprobs[trajectory.loss_mask].astype(np.float64)
        teacher = np.maximum(teacher, config.teacher_logprob_floor)
        step_weights = _step_weights(old, teacher, trajectory, config)
        advantages = np.full(len(old), config.grpo_coefficient * group_advantage)
        if config.distillation == "advantage":
            advantages += config.distillation_coefficient * step_weights * (teacher - old)

        ratio = (logprobs - torch.from_numpy(old)).exp()
        token_losses, is_clipped = _policy_losses(ratio, torch.from_numpy(advantages), config)
        if config.topk.k > 0:
            divergence = _topk_divergence(table, trajectory, config.topk.divergence)
            token_losses = token_losses + (
                config.topk.coefficient * torch.from_numpy(step_weights) * divergence
            )
        total = token_losses.sum() / num_tokens
        for accumulated, gradient in zip(
            gradients, torch.autograd.grad(total, parameters), strict=True
        ):
            accumulated += gradient
        loss += total.item()
        num_clipped += int(is_clipped.sum())
        weights_of_steps += [step_weights[turn][0] for turn in _turns(trajectory)]
        ratios.append(ratio.detach().numpy())
    return EagerUpdate(
        loss=loss,
        gradients=dict(zip(names, gradients, strict=True)),
        clip_fraction=num_clipped / num_tokens,
        mean_step_weight=float(np.mean(weights_of_steps)),
        ratios=np.concatenate(ratios),
    )


def _sampled_distributions(
    model: torch.nn.Module, trajectory: Trajectory
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs ``[N, V]`` at the sampled tokens, and ``[N]`` of the sampled tokens."""
    ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))
    mask = torch.from_numpy(trajectory.loss_mask)
    table = model(ids[None]).logits[0, :-1].double().log_softmax(-1)[mask[1:]]
    return table, table.gather(1, ids[mask][:, None])[:, 0]


def _group_advantages(trajectories: Sequence[Trajectory]) -> list[float]:
    """Reward against the trajectory's group: Eq. 2, with the unbiased standard deviation."""
    advantages = []
    for trajectory in trajectories:
        rewards = [t.reward for t in trajectories if t.group_id == trajectory.group_id]
        centred = trajectory.reward - float(np.mean(rewards))
        advantages.append(centred / (float(np.std(rewards, ddof=1)) + 1e-6))
    return advantages


def _turns(trajectory: Trajectory) -> list[NDArray[np.bool_]]:
    """For each assistant turn, which of the sampled tokens are its own."""
    turn_index = trajectory.turn_index[trajectory.loss_mask]
    return [turn_index == k for k in np.unique(turn_index)]


def _step_weights(
    old: Floats, teacher: Floats, trajectory: Trajectory, config: AlgorithmConfig
) -> Floats:
    """``w_k`` of each sampled token: Eq. 6 and 7, with the running product written out."""
    turns = _turns(trajectory)
    divergences = [float(np.abs(old[turn] - teacher[turn]).mean()) for turn in turns]
    weights, product = np.ones(len(old)), 1.0
    for k in range(1, len(turns)):
        epsilon = config.weight_epsilon
        product *= (divergences[k - 1] + epsilon) / (divergences[k] + epsilon)
        weights[turns[k]] = min(product, 1 + config.weight_delta)
    return weights


def _policy_losses(
    ratio: torch.Tensor, advantages: torch.Tensor, config: AlgorithmConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped policy loss of each token, and whether a bound of the ratio took its gradient."""
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    bound = -advantages * config.dual_clip
    is_at_bound = (advantages < 0) & (losses > bound)
    is_clipped = (-advantages * clipped_ratio > -advantages * ratio) & ~is_at_bound
    return torch.where(is_at_bound, bound, losses), is_clipped


def _topk_divergence(table: torch.Tensor, trajectory: Trajectory, name: str) -> torch.Tensor:
    """``sum_b q_b log(q_b / p_b)`` (forward KL) or ``sum_b p_b log(p_b / q_b)`` (reverse KL), over
    the teacher's K tokens and one bucket for the rest."""
    assert trajectory.teacher_topk_ids is not None
    assert trajectory.teacher_topk_logprobs is not None
    ids = torch.from_numpy(trajectory.teacher_topk_ids[trajectory.loss_mask].astype(np.int64))
    log_q = torch.from_numpy(trajectory.teacher_topk_logprobs[trajectory.loss_mask]).double()
    assert bool((ids >= 0).all())
    rest_log_q = (1 - log_q.exp().sum(1)).clamp(min=1e-6).log()
    log_p = table.gather(1, ids)
    rest_log_p = table.scatter(1, ids, -torch.inf).logsumexp(1)
    log_q = torch.cat([log_q, rest_log_q[:, None]], dim=1)
    log_p = torch.cat([log_p, rest_log_p[:, None]], dim=1)
    if name == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(1)
    assert name == "reverse_kl"
    return (log_p.exp() * (log_p - log_q)).sum(1)
