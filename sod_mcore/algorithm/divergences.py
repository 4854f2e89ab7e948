"""Distances between student and teacher that may be differentiated: sampled-token estimators, and
divergences over the teacher's top-K tokens plus one bucket for all others.

The sampled estimators k1, k2, k3 are those of J. Schulman's note "Approximating KL Divergence"
(2020). In expectation over the student's samples the gradient of k2 is that of the reverse KL and
the gradient of k3 that of the forward KL; k1 has no teacher in its gradient and is here for metrics
only.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

TopKDivergence = Literal["forward_kl", "reverse_kl", "jsd"]
TOPK_DIVERGENCES: tuple[str, ...] = get_args(TopKDivergence)

MAX_LOG_RATIO = 20.0
TEACHER_TAIL_MIN = 1e-6
# 1 - sum(p_k) in float32 is rounding noise below this; a tail that was summed up directly is good
# down to where float32 ends.
STUDENT_TAIL_MIN = 1e-6
STUDENT_TAIL_LOGPROB_MIN = -70.0
# Stands for -inf (a masked column) where 0 * inf would be NaN; no real logit comes near it.
LOGPROB_MIN = -1e4


def k1_divergence(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """``student - teacher``: unbiased for the reverse KL, any shape, nats. Never a loss."""
    return student_logprobs - teacher_logprobs


def k2_divergence(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """``(teacher - student)^2 / 2``, any shape, nats squared."""
    return 0.5 * (teacher_logprobs - student_logprobs).square()


def k3_divergence(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """``exp(d) - 1 - d`` with ``d = teacher - student``, any shape, never negative.

    ``d`` is held within +-20 (zero gradient outside). Below ``|d| = 0.1``, where float32 cancels,
    the power series is used; what it leaves out is under 1e-8 of the value.
    """
    d = (teacher_logprobs - student_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    tail = 1.0 + d / 3.0 * (1.0 + d / 4.0 * (1.0 + d / 5.0 * (1.0 + d / 6.0)))
    return torch.where(d.abs() < 0.1, 0.5 * d.square() * tail, torch.expm1(d) - d)


def topk_divergence(
    student_topk_logprobs: Tensor,
    teacher_topk_logprobs: Tensor,
    *,
    divergence: TopKDivergence,
    jsd_beta: float = 0.5,
    student_tail_logprobs: Tensor | None = None,
) -> Tensor:
    """Divergence on K + 1 buckets: the teacher's K tokens, and the rest of the vocabulary.

    With ``p`` the student, ``q`` the teacher and ``R`` the rest:

    - ``forward_kl``: ``sum_b q_b log(q_b / p_b)``
    - ``reverse_kl``: ``sum_b p_b log(p_b / q_b)``
    - ``jsd``: ``beta KL(q, m) + (1 - beta) KL(p, m)``, ``m = beta q + (1 - beta) p`` (generalised
      Jensen-Shannon divergence, arXiv 2306.13649 Eq. 1)

    The bucket for the rest is what makes probability outside the K tokens cost something;
    renormalising over the K tokens instead would leave it free. A token to which the teacher gives
    no probability (-inf) is no bucket of its own and belongs to the rest.

    Args:
        student_topk_logprobs: ``[..., K]`` under the student's full normaliser, nats, with
            gradient.
        teacher_topk_logprobs: ``[..., K]`` nats, a constant; -inf marks an absent entry, whatever
            the student's value there.
        divergence: one of the three names above.
        jsd_beta: ``beta`` in (0, 1), used by ``jsd``.
        student_tail_logprobs: ``[...]`` log of the student's probability of the rest. Give it where
            the logits are at hand: formed from the K values, it is noise below 1e-6 in float32.

    Returns:
        ``[...]`` nats, differentiable in the student. The teacher's rest is clamped to [1e-6, 1],
        so a perfect match may read as little as -1e-6.

    Raises:
        ValueError: on an unknown name, ``jsd_beta`` out of range, or shapes that differ.
    """
    if divergence not in TOPK_DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} must be one of {TOPK_DIVERGENCES}")
    if student_topk_logprobs.shape != teacher_topk_logprobs.shape:
        raise ValueError(
            f"student_topk_logprobs has shape {tuple(student_topk_logprobs.shape)}, "
            f"teacher_topk_logprobs {tuple(teacher_topk_logprobs.shape)}; they must be equal"
        )
    if divergence == "jsd" and not 0.0 < jsd_beta < 1.0:
        raise ValueError(
            f"jsd_beta={jsd_beta} must lie inside (0, 1): at the ends the divergence vanishes; "
            "use 'forward_kl' or 'reverse_kl' for the limits"
        )
    teacher = teacher_topk_logprobs.detach().to(student_topk_logprobs.dtype)
    present = ~torch.isneginf(teacher)
    log_p = student_topk_logprobs.masked_fill(~present, LOGPROB_MIN).clamp(min=LOGPROB_MIN)
    log_q = teacher.masked_fill(~present, LOGPROB_MIN)
    if student_tail_logprobs is None:
        log_p_rest = _log_one_minus_sum(log_p.masked_fill(~present, -torch.inf))
    else:
        log_p_rest = student_tail_logprobs.clamp(min=STUDENT_TAIL_LOGPROB_MIN)
    # In float64: what the teacher leaves is a small difference of numbers near 1.
    q_rest = (1.0 - teacher.double().exp().sum(-1)).clamp(TEACHER_TAIL_MIN, 1.0)
    log_q_rest = q_rest.log().to(log_p.dtype)
    buckets = _bucket_terms(log_p, log_q, divergence, jsd_beta).masked_fill(~present, 0.0)
    return buckets.sum(-1) + _bucket_terms(log_p_rest, log_q_rest, divergence, jsd_beta)


def _bucket_terms(log_p: Tensor, log_q: Tensor, divergence: str, jsd_beta: float) -> Tensor:
    """Each bucket's share of the divergence, same shape as ``log_p``."""
    if divergence == "forward_kl":
        return log_q.exp() * (log_q - log_p)
    if divergence == "reverse_kl":
        return log_p.exp() * (log_p - log_q)
    log_m = torch.logaddexp(log_q + math.log(jsd_beta), log_p + math.log1p(-jsd_beta))
    teacher_part = jsd_beta * log_q.exp() * (log_q - log_m)
    student_part = (1.0 - jsd_beta) * log_p.exp() * (log_p - log_m)
    return teacher_part + student_part


def _log_one_minus_sum(logprobs: Tensor) -> Tensor:
    """``log(1 - sum exp(logprobs))`` over the last dimension, the difference held above 1e-6."""
    log_sum = torch.logsumexp(logprobs, dim=-1).clamp(max=math.log1p(-STUDENT_TAIL_MIN))
    # Each branch keeps the digits that the other one loses (Machler 2012, "log1mexp").
    near_one = torch.log(-torch.expm1(log_sum.clamp(min=-math.log(2.0))))
    near_zero = torch.log1p(-log_sum.clamp(max=-math.log(2.0)).exp())
    return torch.where(log_sum > -math.log(2.0), near_one, near_zero)
