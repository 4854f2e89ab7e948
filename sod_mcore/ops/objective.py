"""Which loss ``step_weighted_kl`` computes: coefficients and names, checked when it is made."""

import math
from dataclasses import dataclass

from sod_mcore.algorithm.divergences import TOPK_DIVERGENCES, TopKDivergence


@dataclass(frozen=True)
class Objective:
    """The loss of one token, with ``w`` its distillation weight and ``H`` the student's entropy:

        policy_coefficient * clipped policy loss(advantage)
        + w * (k2_coefficient * k2 + k3_coefficient * k3 + topk_coefficient * top-K divergence)
        - entropy_coefficient * H

    ``w`` does not multiply the policy loss: its advantages hold their weights already. k1 is not
    among the terms, because as a loss it has no teacher in its gradient; it is the distillation
    *advantage*. A top-K divergence is a loss only: as an advantage it would not depend on the token
    that was sampled, and its expected gradient would be zero.

    Raises:
        ValueError: one message with every field that is out of range.
    """

    policy_coefficient: float = 1.0
    clip_low: float = 0.2  # the ratio counts from 1 - clip_low on
    clip_high: float = 0.28  # and up to 1 + clip_high
    dual_clip: float | None = 3.0  # bounds the loss of negative advantages; None: no bound
    k2_coefficient: float = 0.0
    k3_coefficient: float = 0.0
    topk_divergence: TopKDivergence = "reverse_kl"
    topk_coefficient: float = 0.0
    jsd_beta: float = 0.5  # weight of KL(teacher, mixture) in topk_divergence="jsd"
    entropy_coefficient: float = 0.0  # positive: a bonus for entropy

    def __post_init__(self) -> None:
        faults = [*self._coefficient_faults(), *self._clip_faults(), *self._divergence_faults()]
        if faults:
            raise ValueError("Objective: " + "; ".join(faults))

    @property
    def needs_teacher_logprobs(self) -> bool:
        """Whether a term reads the teacher's log-prob of the sampled token."""
        return self.k2_coefficient != 0.0 or self.k3_coefficient != 0.0

    @property
    def needs_teacher_topk(self) -> bool:
        """Whether a term reads the teacher's top-K."""
        return self.topk_coefficient != 0.0

    def _coefficient_faults(self) -> list[str]:
        names = ("policy_coefficient", "k2_coefficient", "k3_coefficient", "topk_coefficient")
        faults = [
            f"{name}={getattr(self, name)} must be finite and at least 0"
            for name in names
            if not 0.0 <= getattr(self, name) < math.inf
        ]
        if not math.isfinite(self.entropy_coefficient):
            faults.append(f"entropy_coefficient={self.entropy_coefficient} must be finite")
        if not any(getattr(self, name) for name in (*names, "entropy_coefficient")):
            faults.append("every coefficient is 0, so there is no loss; set at least one")
        return faults

    def _clip_faults(self) -> list[str]:
        faults = []
        if not 0.0 <= self.clip_low <= 1.0:
            faults.append(f"clip_low={self.clip_low} must lie in [0, 1]")
        if not 0.0 <= self.clip_high < math.inf:
            faults.append(f"clip_high={self.clip_high} must be finite and at least 0")
        if self.dual_clip is not None and not 1.0 < self.dual_clip < math.inf:
            faults.append(f"dual_clip={self.dual_clip} must be finite and above 1, or None")
        return faults

    def _divergence_faults(self) -> list[str]:
        faults = []
        if self.topk_divergence not in TOPK_DIVERGENCES:
            faults.append(
                f"topk_divergence={self.topk_divergence!r} must be one of {TOPK_DIVERGENCES}; "
                "sampled-token estimators are set by k2_coefficient and k3_coefficient, and k1 is "
                "an advantage (algorithm.distillation_advantages)"
            )
        if not 0.0 < self.jsd_beta < 1.0:
            faults.append(
                f"jsd_beta={self.jsd_beta} must lie inside (0, 1); its limits are "
                "topk_divergence='forward_kl' (0) and 'reverse_kl' (1)"
            )
        return faults
