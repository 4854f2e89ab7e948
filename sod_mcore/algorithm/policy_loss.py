"""The clipped policy-gradient loss that carries both the reward and the distillation advantage.

PPO with one clip bound for each side (DAPO, arXiv 2503.14476), a second bound for negative
advantages (dual clip, arXiv 1912.09729) and, by option, truncated importance sampling against the
engine that sampled the tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) is 4.9e8: past it the ratio says nothing more, and float32 products would overflow.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class ClippedTokenLoss:
    """The loss of single tokens; every tensor has the shape of the log-probs."""

    token_loss: Tensor  # differentiable
    ratio: Tensor  # detached
    is_clipped: Tensor  # bool: the ratio bound took the gradient away
    is_dual_clipped: Tensor  # bool: the dual-clip bound did


@dataclass(frozen=True)
class PolicyLoss:
    """What the trainer uses (``token_loss``), and the same in single numbers for readers."""

    token_loss: Tensor  # [B, T] differentiable, 0 where the mask is 0
    loss: Tensor  # [] differentiable, mean over mask-1 tokens
    clip_fraction: Tensor  # [] share of mask-1 tokens at the ratio bound
    dual_clip_fraction: Tensor  # [] share of mask-1 tokens at the dual-clip bound
    approx_kl: Tensor  # [] mean of old - new log-prob, nats


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3.0,
    rollout_logprobs: Tensor | None = None,
    tis_cap: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate over the tokens of a batch; see :func:`clipped_token_loss` for the formula.

    Args:
        logprobs: ``[B, T]`` current log-probs of the sampled tokens, nats, with gradient.
        old_logprobs: ``[B, T]`` the same at the start of the training step.
        advantages: ``[B, T]`` total advantages.
        loss_mask: ``[B, T]`` bool (or 0/1). Values where it is 0 never matter.
        clip_low: the ratio counts from ``1 - clip_low`` on.
        clip_high: the ratio counts up to ``1 + clip_high``.
        dual_clip: bound ``c`` on the loss of negative advantages, ``-c * A``; None for none.
        rollout_logprobs: ``[B, T]`` log-probs reported by the engine that sampled.
        tis_cap: truncates the importance weight ``exp(old - rollout)`` from above; the token's loss
            is multiplied by it. Both or neither of the last two must be given.

    Returns:
        :class:`PolicyLoss`. A batch without mask-1 tokens has loss 0 and gradient 0.

    Raises:
        ValueError: on constants out of range, or one of the importance-sampling pair alone.
    """
    if (rollout_logprobs is None) != (tis_cap is None):
        raise ValueError(
            "rollout_logprobs and tis_cap belong together: give both for truncated importance "
            "sampling, or neither"
        )
    mask = loss_mask.bool()
    # Masked on the way in: a NaN outside the mask would otherwise come back through 0 * NaN in the
    # backward pass.
    tokens = clipped_token_loss(
        logprobs.masked_fill(~mask, 0.0),
        old_logprobs.masked_fill(~mask, 0.0),
        advantages.masked_fill(~mask, 0.0),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    token_loss = tokens.token_loss
    if rollout_logprobs is not None and tis_cap is not None:
        token_loss = token_loss * _truncated_importance(
            old_logprobs, rollout_logprobs, mask, tis_cap
        )
    token_loss = token_loss.masked_fill(~mask, 0.0)
    count = mask.sum().clamp(min=1)
    gap = (old_logprobs - logprobs).detach().masked_fill(~mask, 0.0)
    return PolicyLoss(
        token_loss=token_loss,
        loss=token_loss.sum() / count,
        clip_fraction=(tokens.is_clipped & mask).sum() / count,
        dual_clip_fraction=(tokens.is_dual_clipped & mask).sum() / count,
        approx_kl=gap.sum() / count,
    )


def clipped_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> ClippedTokenLoss:
    """``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`` with ``r = exp(new - old)``, and for
    ``A < 0`` at most ``-A * dual_clip``.

    Args:
        logprobs: any shape, nats, with gradient.
        old_logprobs: same shape; a constant.
        advantages: same shape; a constant.
        clip_low: in [0, 1].
        clip_high: at least 0.
        dual_clip: above 1, or None.

    Returns:
        :class:`ClippedTokenLoss`.

    Raises:
        ValueError: on constants out of range.
    """
    if not 0.0 <= clip_low <= 1.0 or not clip_high >= 0.0:
        raise ValueError(
            f"clip_low={clip_low}, clip_high={clip_high}: 0 <= clip_low <= 1 and clip_high >= 0 "
            "must hold; the usual values are 0.2 and 0.28"
        )
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip={dual_clip} must be above 1, or None to leave it out")
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    is_clipped = (clipped > unclipped).detach()
    # The branch is chosen once, so that the reported flags and the gradient cannot disagree.
    token_loss = torch.where(is_clipped, clipped, unclipped)
    is_dual_clipped = torch.zeros_like(is_clipped)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        is_dual_clipped = ((advantages < 0) & (token_loss > bound)).detach()
        token_loss = torch.where(is_dual_clipped, bound, token_loss)
    return ClippedTokenLoss(
        token_loss=token_loss,
        ratio=ratio.detach(),
        is_clipped=is_clipped,
        is_dual_clipped=is_dual_clipped,
    )


def _truncated_importance(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, tis_cap: float
) -> Tensor:
    if not tis_cap > 0.0:
        raise ValueError(f"tis_cap={tis_cap} must be positive; usual values are 2 to 10")
    log_ratio = (old_logprobs - rollout_logprobs).detach().masked_fill(~mask, 0.0)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=tis_cap)
