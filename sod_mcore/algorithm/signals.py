"""From a scored batch to what the loss reads: step weights and token advantages.

Everything is computed once, on whole trajectories, before any packing or sharding (design rule 1),
and is constant in the loss: only log-probs under the current weights carry a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sod_mcore.algorithm.advantages import distillation_advantages, grpo_advantages
from sod_mcore.algorithm.finite import floor_logprobs
from sod_mcore.algorithm.weighting import StepFacts, apply_rule, shrunk_divergence
from sod_mcore.algorithm.weights import StepWeights, compute_step_weights
from sod_mcore.config import AlgorithmConfig
from sod_mcore.trajectory import Trajectory


@dataclass(frozen=True)
class TrajectorySignals:
    """What the loss needs about one trajectory; arrays are float32 ``[T]``, 0 outside the mask.

    Attributes:
        loss_mask: bool ``[T]``; all False if the teacher was needed and could not score it.
        advantages: group advantage plus, where distillation is an advantage, the weighted log-ratio
            of teacher and student.
        token_weights: step weight of each token.
        old_logprobs: the student's log-probs at the start of the step.
        teacher_logprobs: the teacher's, floored.
        step_divergence: ``d_k`` of each assistant turn, ``[K]``.
        step_weights: ``w_k`` of each assistant turn, ``[K]``.
        step_lengths: sampled tokens of each assistant turn, ``[K]``.
        group_advantage: the group-relative advantage of the trajectory.
    """

    loss_mask: NDArray[np.bool_]
    advantages: NDArray[np.float32]
    token_weights: NDArray[np.float32]
    old_logprobs: NDArray[np.float32]
    teacher_logprobs: NDArray[np.float32]
    step_divergence: NDArray[np.float32]
    step_weights: NDArray[np.float32]
    step_lengths: NDArray[np.int64]
    group_advantage: float


@dataclass(frozen=True)
class BatchSignals:
    """The signals of a batch and what is worth logging about them.

    Attributes:
        trajectories: in the batch's order.
        num_floored: teacher log-probs that were raised to the floor.
        num_unscored: trajectories left out of the loss.
        reverse_kl: mean of student minus teacher log-prob over the tokens in the loss.
        mean_step_divergence: mean ``d_k`` over all steps.
        mean_step_weight: mean ``w_k`` over all steps.
    """

    trajectories: tuple[TrajectorySignals, ...]
    num_floored: int
    num_unscored: int
    reverse_kl: float
    mean_step_divergence: float
    mean_step_weight: float


@dataclass(frozen=True)
class _PaddedSignals:
    """The signals of a batch of B trajectories, padded to the longest one, T.

    Attributes:
        loss_mask: bool ``[B, T]``.
        advantages, old_logprobs, teacher_logprobs: floats ``[B, T]``.
        steps: ``d_k`` and ``w_k``, ``[B, K]`` and by token.
        group_advantages: ``[B]``.
    """

    loss_mask: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor
    teacher_logprobs: torch.Tensor
    steps: StepWeights
    group_advantages: torch.Tensor

    def trajectory(self, i: int, length: int) -> TrajectorySignals:
        """Row ``i`` without its padding."""
        num_steps = int(self.steps.num_steps[i])
        return TrajectorySignals(
            loss_mask=self.loss_mask[i, :length].numpy(),
            advantages=self.advantages[i, :length].float().numpy(),
            token_weights=self.steps.token_weights[i, :length].float().numpy(),
            old_logprobs=self.old_logprobs[i, :length].float().numpy(),
            teacher_logprobs=self.teacher_logprobs[i, :length].float().numpy(),
            step_divergence=self.steps.step_divergence[i, :num_steps].float().numpy(),
            step_weights=self.steps.step_weights[i, :num_steps].float().numpy(),
            step_lengths=self.steps.step_lengths[i, :num_steps].long().numpy(),
            group_advantage=float(self.group_advantages[i]),
        )


def compute_signals(
    trajectories: Sequence[Trajectory],
    old_logprobs: Sequence[NDArray[np.float32]],
    config: AlgorithmConfig,
) -> BatchSignals:
    """Step weights and advantages of a whole batch.

    Args:
        trajectories: the batch; trajectories with equal ``group_id`` are compared.
        old_logprobs: float32 ``[T]`` for each trajectory, NaN outside the loss mask.
        config: coefficients and options.
    """
    needs_teacher = config.needs_teacher
    masks = [t.loss_mask if t.is_scored or not needs_teacher else np.zeros_like(t.loss_mask)
             for t in trajectories]  # fmt: skip
    mask = _pad(masks, False)
    student = _pad([np.nan_to_num(x) for x in old_logprobs], 0.0)
    teacher, num_floored = _teacher_logprobs(trajectories, mask, student, needs_teacher, config)
    steps = compute_step_weights(
        student,
        teacher,
        mask,
        turn_index=_pad([t.turn_index for t in trajectories], -1),
        epsilon=config.weight_epsilon,
        delta=config.weight_delta,
    )
    group = _group_advantages(trajectories, config)
    facts = StepFacts(
        divergence=shrunk_divergence(steps, config.weight_prior_tokens).double(),
        lengths=steps.step_lengths,
        first_failure=torch.tensor([_first_failure(t) for t in trajectories]),
        group_advantages=group,
    )
    steps = apply_rule(steps, facts, config)
    advantages = config.grpo_coefficient * group[:, None] * mask
    if config.distillation == "advantage":
        advantages = advantages + distillation_advantages(
            student,
            teacher,
            steps.token_weights,
            mask,
            coefficient=config.distillation_coefficient,
            log_ratio_cap=config.log_ratio_cap,
        )
    if config.tis_cap is not None:
        advantages = advantages * _importance_weights(trajectories, student, mask, config.tis_cap)
    padded = _PaddedSignals(mask, advantages, student, teacher, steps, group)
    return BatchSignals(
        trajectories=tuple(padded.trajectory(i, len(t)) for i, t in enumerate(trajectories)),
        num_floored=num_floored,
        num_unscored=sum(not t.is_scored for t in trajectories) if needs_teacher else 0,
        reverse_kl=_masked_mean(student - teacher, mask),
        mean_step_divergence=_nan_mean(steps.step_divergence),
        mean_step_weight=_nan_mean(steps.step_weights),
    )


def _first_failure(trajectory: Trajectory) -> int:
    """The turn whose tool call was the first to fail; past all turns where none did."""
    calls = trajectory.tool_succeeded  # one for each turn but the last
    return calls.index(False) if False in calls else trajectory.num_turns


def _teacher_logprobs(
    trajectories: Sequence[Trajectory],
    mask: torch.Tensor,
    student: torch.Tensor,
    needs_teacher: bool,
    config: AlgorithmConfig,
) -> tuple[torch.Tensor, int]:
    """Floored teacher log-probs ``[B, T]``; the student's own where no teacher is asked."""
    if not needs_teacher:
        return student, 0
    teacher = _pad([t.teacher_logprobs for t in trajectories], 0.0)
    teacher = torch.where(mask, teacher, torch.zeros_like(teacher))
    return floor_logprobs(teacher, config.teacher_logprob_floor)


def _group_advantages(trajectories: Sequence[Trajectory], config: AlgorithmConfig) -> torch.Tensor:
    names = {name: i for i, name in enumerate(dict.fromkeys(t.group_id for t in trajectories))}
    return grpo_advantages(
        torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
        torch.tensor([names[t.group_id] for t in trajectories], dtype=torch.int64),
        normalize_by_std=config.normalize_by_std,
    )


def _importance_weights(
    trajectories: Sequence[Trajectory], student: torch.Tensor, mask: torch.Tensor, cap: float
) -> torch.Tensor:
    """Truncated importance weights ``[B, T]`` against the rollout engine's log-probs.

    The clipped policy loss is homogeneous in the advantage, so scaling the advantage here is the
    same as scaling the loss (``policy_loss``'s ``tis_cap``).
    """
    rollout = _pad([np.nan_to_num(t.rollout_logprobs) for t in trajectories], 0.0)
    ratio = torch.exp((student - rollout).clamp(-20.0, 20.0)).clamp(max=cap)
    return torch.where(mask, ratio, torch.ones_like(ratio))


def _pad(rows: Sequence[NDArray[np.generic]], value: float | bool) -> torch.Tensor:
    """Stack rows of different lengths to ``[B, T]``."""
    width = max((len(row) for row in rows), default=0)
    dtype = rows[0].dtype if rows else np.float32
    padded = np.full((len(rows), width), value, dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> float:
    return float(values[mask].double().mean()) if mask.any() else 0.0


def _nan_mean(values: torch.Tensor) -> float:
    return float(values.double().nanmean()) if values.isfinite().any() else 0.0
