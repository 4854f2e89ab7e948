"""What ``step_weighted_kl`` returns, for every implementation of it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepWeightedKL:
    """Values per row of the logits; all but ``token_loss`` are detached.

    ``terms`` holds the summands of ``token_loss`` (coefficient, weight and sign included), for the
    terms whose coefficient is not 0: ``policy``, ``k2``, ``k3``, ``topk_forward_kl``,
    ``topk_reverse_kl`` or ``topk_jsd``, ``entropy``.
    """

    token_loss: Tensor  # [N] differentiable, not divided by any token count
    logprobs: Tensor  # [N] of the target, nats
    entropy: Tensor  # [N] of the student's distribution, nats
    ratio: Tensor  # [N] exp(logprobs - old_logprobs)
    is_clipped: Tensor  # [N] bool: a clip bound, dual clip included, took the policy gradient away
    terms: dict[str, Tensor]  # name -> [N]
    topk_logprobs: Tensor | None  # [N, K] the student's, -inf where the id is -1; None without ids
