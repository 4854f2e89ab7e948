"""What becomes of log-probs that are not finite, before any mean or product sees them.

A teacher may give a sampled token probability zero (-inf): that is a judgement and is kept,
floored. NaN means that nobody scored the token: that is missing data and is never filled in.
"""

import torch
from torch import Tensor

TEACHER_LOGPROB_FLOOR = -50.0


def floor_logprobs(logprobs: Tensor, floor: float = TEACHER_LOGPROB_FLOOR) -> tuple[Tensor, int]:
    """Raise log-probs below ``floor``, -inf included, to ``floor``.

    Args:
        logprobs: any shape, any float dtype, nats. NaN (not scored) stays NaN.
        floor: finite and negative, nats.

    Returns:
        The floored log-probs (same shape and dtype) and how many values were raised.

    Raises:
        ValueError: if ``floor`` is not finite and negative.
    """
    if not -float("inf") < floor < 0.0:
        raise ValueError(f"floor={floor} must be finite and negative; the usual value is -50.0")
    below = logprobs < floor
    return logprobs.masked_fill(below, floor), int(below.sum())


def require_finite(name: str, values: Tensor, loss_mask: Tensor, *, allow_neg_inf: bool) -> None:
    """Refuse values inside the mask that no later formula could use.

    Args:
        name: the argument's name, for the message.
        values: ``[B, T]`` floats.
        loss_mask: ``[B, T]`` bool.
        allow_neg_inf: whether -inf (probability zero) may pass.

    Raises:
        ValueError: naming the argument, the count and the first place of a bad value.
    """
    bad = loss_mask & ~torch.isfinite(values)
    if allow_neg_inf:
        bad &= ~torch.isneginf(values)
    if not bool(bad.any()):
        return
    first = tuple(bad.nonzero()[0].tolist())
    raise ValueError(
        f"{name} holds {int(bad.sum())} unusable value(s) inside loss_mask, the first being "
        f"{values[first].item()} at {first}. Drop a trajectory that could not be scored from the "
        "loss (mask 0), and pass teacher log-probs through floor_logprobs"
    )
