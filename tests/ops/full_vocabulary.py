"""The loss of ``step_weighted_kl`` written out over the whole vocabulary, row by row, in float64.

It uses log_softmax and plain autograd and shares no code with the package.
"""

import torch
from torch import Tensor

from sod_mcore.ops import Objective


def token_terms(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    token_weights: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
    objective: Objective,
) -> list[dict[str, Tensor]]:
    """Summands of the loss of each row, unweighted rows left in."""
    rows = []
    for n in range(logits.shape[0]):
        logp = (logits[n, :vocab_size].double() / temperature).log_softmax(-1)
        lp, old, adv = logp[targets[n]], old_logprobs[n].double(), advantages[n].double()
        ratio = (lp - old).exp()
        policy = torch.maximum(
            -adv * ratio,
            -adv * ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high),
        )
        if objective.dual_clip is not None and adv < 0:
            policy = torch.minimum(policy, -adv * objective.dual_clip)
        gap = teacher_logprobs[n].double() - lp
        weight = token_weights[n].double()
        rows.append(
            {
                "policy": objective.policy_coefficient * policy,
                "k2": weight * objective.k2_coefficient * gap**2 / 2,
                "k3": weight * objective.k3_coefficient * (gap.exp() - 1 - gap),
                f"topk_{objective.topk_divergence}": weight
                * objective.topk_coefficient
                * _bucket_divergence(
                    logp, teacher_topk_ids[n], teacher_topk_logprobs[n], objective
                ),
                "entropy": objective.entropy_coefficient * (logp.exp() * logp).sum(),
            }
        )
    return rows


def _bucket_divergence(logp: Tensor, ids: Tensor, logq: Tensor, objective: Objective) -> Tensor:
    keep = (ids >= 0) & (logq > -torch.inf)
    ids, q = ids[keep], logq[keep].double().exp()
    q = torch.cat([q, (1 - q.sum()).clamp(1e-6, 1).reshape(1)])
    rest = torch.ones_like(logp, dtype=torch.bool)
    rest[ids] = False
    p = torch.cat([logp[ids].exp(), logp[rest].exp().sum().reshape(1)])
    if objective.topk_divergence == "forward_kl":
        return (q * (q / p).log()).sum()
    if objective.topk_divergence == "reverse_kl":
        return (p * (p / q).log()).sum()
    beta = objective.jsd_beta
    mixture = beta * q + (1 - beta) * p
    teacher_part = (q * (q / mixture).log()).sum()
    return beta * teacher_part + (1 - beta) * (p * (p / mixture).log()).sum()
