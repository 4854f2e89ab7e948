"""Settings of what is optimised: losses, advantages, step weights, the teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from sod_mcore.config.base import STRICT, NonNegative, Positive

REFUSED_SIGNALS = {
    "k1_loss": "its gradient does not depend on the teacher; take advantage, k2_loss or k3_loss",
    "topk_advantage": "its expected gradient is zero; take topk_loss",
    "topk_without_tail": "what the student puts outside would cost nothing; take topk_loss",
}
"""Pairings of estimator and use that teach nothing, or the wrong thing."""


def _refuse_signal(value: object) -> object:
    if isinstance(value, str) and value in REFUSED_SIGNALS:
        raise ValueError(REFUSED_SIGNALS[value])
    return value


TeacherSignal = Annotated[
    Literal["advantage", "k2_loss", "k3_loss", "topk_loss", "none"], BeforeValidator(_refuse_signal)
]


@dataclass(config=STRICT, kw_only=True, frozen=True)
class TopKConfig:
    """Distillation on the teacher's K likeliest tokens plus one bucket for all others."""

    k: NonNegative = 0
    """Teacher candidates a token; 0 asks the teacher for none."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    """Divergence between the bucketed distributions; always a differentiable loss."""
    coefficient: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the term; each token is further weighted by its step weight."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Mixture weight of the teacher for "jsd"."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class AlgorithmConfig:
    """What is optimised (sections of the SOD paper in brackets)."""

    prompts_per_step: Positive = 64
    """Prompts sampled in a training step."""
    group_size: Positive = 16
    """Samples of each prompt; their rewards are compared with each other."""
    prompts_per_mini_batch: Positive = 16
    """Whole groups in one optimizer update; must divide prompts_per_step."""
    epochs: Positive = 1
    """Passes over the batch of a step."""
    grpo_coefficient: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the group-relative advantage (Eq. 2)."""
    normalize_by_std: bool = True
    """Divide group advantages by the group's standard deviation."""
    distillation: TeacherSignal = "advantage"
    """What becomes of the teacher's scores: an advantage of the sampled token (k1, as the paper), a
    k2 loss on it (expected gradient of the reverse KL), a k3 loss (of the forward KL), a loss on
    the teacher's topk.k likeliest tokens and the rest, or nothing."""
    distillation_coefficient: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the sampled-token distillation term (Eq. 10)."""
    topk: TopKConfig = Field(default_factory=TopKConfig)
    """The teacher's likeliest tokens, for distillation: topk_loss; with another choice, k > 0 adds
    that loss to it."""
    weighting: str = "sod"
    """Rule of the step weights: "sod": min((d_1 + epsilon) / (d_k + epsilon), 1 + delta) (Eq. 7);
    "uniform": 1; "failure_decay": decay^(k - k_err) after the first failed tool call;
    "failure_mask": 0 after it; "reward_gate": gate_max * sigmoid(-group advantage) for all steps;
    or package.module:function, a function of yours (sod_mcore/algorithm/weighting.py)."""
    weight_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """epsilon of Eq. 7."""
    weight_delta: Annotated[float, Field(ge=0)] = 0.2
    """delta of Eq. 7; .inf for no clip."""
    weight_first_divergence_floor: Annotated[float, Field(ge=0)] = 0.0
    """Beyond the paper: d_1 counts as at least this many nats, so that a first step which all but
    agrees with the teacher does not mute every later one. 0 is off."""
    weight_prior_tokens: Annotated[float, Field(ge=0)] = 0.0
    """Beyond the paper: d_k of short steps is drawn towards the sample's mean d over all its
    tokens, (n_k d_k + prior d) / (n_k + prior) for a step of n_k tokens. 0 is off."""
    weight_failure_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Factor a step after the first failed tool call, for "failure_decay"."""
    weight_gate_max: Annotated[float, Field(gt=0)] = 0.1
    """Largest share of the teacher, for "reward_gate"."""
    log_ratio_cap: Annotated[float, Field(gt=0)] | None = None
    """Beyond the paper: teacher minus student counts as at most this many nats either way in the
    distillation advantage. null is off."""
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Lower clip of the probability ratio."""
    clip_high: Annotated[float, Field(ge=0)] = 0.28
    """Upper clip of the probability ratio."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    """Bound on the loss of negative advantages, as a multiple of the advantage."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """Where the old log-probs come from: a forward pass of the trainer, or the rollout engine."""
    tis_cap: Annotated[float, Field(gt=0)] | None = None
    """Cap of truncated importance sampling against the rollout's log-probs: scales the advantages,
    not the k2, k3 and top-K losses. null turns it off."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Entropy bonus."""
    teacher_logprob_floor: Annotated[float, Field(lt=0)] = -50.0
    """Non-finite or smaller teacher log-probs are raised to this value and counted."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of a training step."""
        return self.prompts_per_step // self.prompts_per_mini_batch * self.epochs

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of the loss reads the teacher's scores."""
        return self.distillation != "none"


@dataclass(config=STRICT, kw_only=True, frozen=True)
class TeacherConfig:
    """Who scores the student's tokens, and what it is told that the student is not."""

    weights: Literal["served", "live", "average"] = "served"
    """Whose weights: "served" those under serving.teacher and serving.teachers, as they are (the
    student's own folder there makes its initial weights the teacher); "live" the student's engines
    with their current weights; "average" serving.teacher, whose engines receive an exponential
    average of the student's weights after each step."""
    average_decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Share of the old average that stays after an optimizer update, for weights: average."""
    by_source: dict[str, str] = Field(default_factory=dict)
    """Teacher by prefix of data_source: names of serving.teachers, or "teacher". The longest prefix
    decides; other sources have serving.teacher."""
    privileged: Literal["none", "ground_truth", "hint"] = "none"
    """What the teacher reads after the user's last message and the student does not: nothing, the
    ground truth, or extra_info.hint of the row. It scores the same response tokens."""
    privileged_text: str | None = None
    """Words around it: {ground_truth}, or {hint}, stands for the privileged text; null takes
    sod_mcore's own."""
    privileged_max_characters: Positive = 4000
    """Longest privileged text; of a longer one, as the tests of a program may be, the rest is left
    out."""
