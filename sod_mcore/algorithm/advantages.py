"""What each sampled token is rewarded with: GRPO's group-relative reward, plus the teacher's
opinion of the token, weighted by step.

Both are constants of the policy loss. The sampled log-ratio (k1) is right as an advantage only: as
a loss, its gradient would not contain the teacher at all.
"""

from typing import Literal

import torch
from torch import Tensor

from sod_mcore.algorithm.finite import require_finite

STD_EPSILON = 1e-6


@torch.no_grad()
def grpo_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    normalize_by_std: bool = True,
    single_sample: Literal["zero", "reward"] = "zero",
) -> Tensor:
    """Advantage of each trajectory within its group (SOD Eq. 2).

    ``(R - mean) / (std + 1e-6)`` with the unbiased standard deviation over the group; without
    ``normalize_by_std``, ``R - mean`` (Dr.GRPO). A group of equal rewards gives exactly 0.

    Args:
        rewards: ``[B]`` floats.
        group_ids: ``[B]`` integers; equal ids form a group, in any order.
        normalize_by_std: whether to divide by the standard deviation.
        single_sample: what a group of one gets: 0, since it has nothing to be compared with, or the
            reward itself (mean 0 and standard deviation 1), as the public SOD implementation does.

    Returns:
        ``[B]`` in the rewards' dtype (float32 for integer rewards), computed in float64.

    Raises:
        ValueError: on shapes other than [B], a reward that is not finite, or an unknown option.
    """
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}, group_ids {tuple(group_ids.shape)}; "
            "both must be [B]"
        )
    if single_sample not in ("zero", "reward"):
        raise ValueError(f"single_sample={single_sample!r} must be 'zero' or 'reward'")
    if not bool(torch.isfinite(rewards).all()):
        where = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
        raise ValueError(
            f"rewards is not finite at {where[:8]}; drop a trajectory whose reward is unknown from "
            "its group before calling"
        )
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    values = rewards.double()
    groups, group = torch.unique(group_ids, return_inverse=True)
    zeros = values.new_zeros(groups.numel())
    size = zeros.scatter_add(0, group, torch.ones_like(values))
    # Advantages do not change under a shift. Taking the group's minimum away first makes a group of
    # equal rewards exactly 0, which a rounded mean does not.
    lowest = zeros.scatter_reduce(0, group, values, "amin", include_self=False)
    shifted = values - lowest[group]
    centred = shifted - (zeros.scatter_add(0, group, shifted) / size)[group]
    variance = zeros.scatter_add(0, group, centred.square()) / (size - 1).clamp(min=1)
    is_single = (size == 1)[group]
    std = torch.where(is_single, 1.0, variance.sqrt()[group])
    if single_sample == "reward":
        centred = torch.where(is_single, values, centred)
    return (centred / (std + STD_EPSILON) if normalize_by_std else centred).to(dtype)


@torch.no_grad()
def distillation_advantages(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    token_weights: Tensor,
    loss_mask: Tensor,
    *,
    coefficient: float = 1.0,
    log_ratio_cap: float | None = None,
) -> Tensor:
    """``coefficient * w_k * (teacher - student)`` for each sampled token (SOD Eq. 8 and 9, sign
    turned: an advantage is minus a loss).

    Args:
        student_logprobs: ``[B, T]`` log-probs of the sampled tokens at the start of the step, nats.
        teacher_logprobs: ``[B, T]`` the same under the teacher, floored.
        token_weights: ``[B, T]`` from :func:`~sod_mcore.algorithm.compute_step_weights`.
        loss_mask: ``[B, T]`` bool (or 0/1).
        coefficient: scale against the GRPO advantage.
        log_ratio_cap: holds ``teacher - student`` within plus and minus this, nats; None for no
            limit, as the paper.

    Returns:
        ``[B, T]`` in the student's dtype (at least float32), 0 where the mask is 0, no gradient.

    Raises:
        ValueError: if a value inside the mask is not finite.
    """
    mask = loss_mask.bool()
    for name, values in (
        ("student_logprobs", student_logprobs),
        ("teacher_logprobs", teacher_logprobs),
        ("token_weights", token_weights),
    ):
        require_finite(name, values, mask, allow_neg_inf=False)
    dtype = torch.promote_types(student_logprobs.dtype, torch.float32)
    gap = teacher_logprobs.to(dtype) - student_logprobs.to(dtype)
    if log_ratio_cap is not None:
        gap = gap.clamp(-log_ratio_cap, log_ratio_cap)
    return (coefficient * token_weights.to(dtype) * gap).masked_fill(~mask, 0.0)


@torch.no_grad()
def gated_distillation_advantages(
    advantages: Tensor,
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    gamma: float = 1.0,
    beta_min: float = 0.0,
    beta_max: float = 0.1,
) -> Tensor:
    """The form that preceded step-wise weights: one gate a trajectory, open when it did badly.

    ``A_i + beta_i * (teacher - student)`` with ``beta_i = beta_min + (beta_max - beta_min) *
    sigmoid(-gamma * A_i)``; kept for ablations.

    Args:
        advantages: ``[B]`` advantage ``A_i`` of each trajectory.
        student_logprobs: ``[B, T]`` nats.
        teacher_logprobs: ``[B, T]`` nats, floored.
        loss_mask: ``[B, T]`` bool (or 0/1).
        gamma: steepness of the gate.
        beta_min: smallest share of the teacher.
        beta_max: largest share of the teacher.

    Returns:
        ``[B, T]`` total advantage (the GRPO part is included), 0 where the mask is 0.

    Raises:
        ValueError: if the range is empty or a log-prob inside the mask is not finite.
    """
    if not 0.0 <= beta_min < beta_max:
        raise ValueError(
            f"beta_min={beta_min} and beta_max={beta_max}: 0 <= beta_min < beta_max must hold"
        )
    mask = loss_mask.bool()
    require_finite("student_logprobs", student_logprobs, mask, allow_neg_inf=False)
    require_finite("teacher_logprobs", teacher_logprobs, mask, allow_neg_inf=False)
    gate = beta_min + (beta_max - beta_min) * torch.sigmoid(-gamma * advantages)
    total = advantages[:, None] + gate[:, None] * (teacher_logprobs - student_logprobs)
    return total.masked_fill(~mask, 0.0)
