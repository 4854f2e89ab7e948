"""Every number of the arithmetic recipe: problems, demonstrations, tokenizer, models.

The values are in ``recipe.yaml``; ``key=value`` on a script's command line overrides them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sod_mcore.config import STRICT, Fraction, NonNegative, Positive


@dataclass(config=STRICT, kw_only=True, frozen=True)
class FamilyShares:
    """Relative frequency of each kind of problem."""

    chain_sum: Fraction
    """Sums and differences of two or three numbers of up to three digits."""
    products: Fraction
    """Products of two numbers of up to three digits."""
    basic_arithmetic: Fraction
    """One operation on two numbers of up to two digits."""
    two_step: Fraction
    """A sum, then an operation on its result: the second call depends on the first."""
    three_step: Fraction = 0.0
    """A sum, then two operations, each on the result before."""

    @model_validator(mode="after")
    def _check_some(self) -> FamilyShares:
        if sum(asdict(self).values()) <= 0:
            raise ValueError("at least one family must have a share above 0")
        return self


@dataclass(config=STRICT, kw_only=True, frozen=True)
class AgentHabits:
    """How an agent works in its demonstrations, good and bad."""

    conversations: Positive
    """Demonstrations written."""
    fails: Fraction = 0.0
    """Probability that the first call of a step fails."""
    fails_again: Fraction = 0.3
    """Probability that the call after a failing one fails too."""
    max_failing_calls: NonNegative = 2
    """Failing calls in one step at most."""
    learns_failing_calls: bool = True
    """Whether failing calls carry loss; if not, only their repair is learned."""
    gives_up: Fraction = 0.0
    """Probability of giving up after the failing calls of a step."""
    stops_early: Fraction = 0.0
    """After each step but the last: probability of giving its result as the answer."""
    told: Fraction = 0.0
    """Probability that the question tells the answer; who knows it goes on until it is there. So
    that a model of this size knows what to make of an answer, when it is its own teacher (OPSD)."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class CopyShares:
    """Relative frequency of each kind of copying exercise."""

    first_call: Fraction
    """From the question into the first call."""
    second_call: Fraction
    """From question and results into the calls after the first; for problems of one step, as
    above."""
    answer: Fraction
    """From a result into the answer."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class DataSettings:
    """What ``make_data.py`` writes."""

    seed: int
    """Seeds problems and demonstrations."""
    train_prompts: Positive
    """Prompts for reinforcement learning."""
    eval_prompts: Positive
    """Held-out prompts; no other file has one of their questions."""
    copy_rows: Positive
    """Single turns in which only copying is practised; the first stage of fine-tuning."""
    copy_kinds: CopyShares
    """What they practise."""
    families: FamilyShares
    teacher: AgentHabits
    """A careful agent that knows how to repair a failing call."""
    student: AgentHabits
    """A sloppy agent: what distillation is to mend."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class TokenizerSettings:
    """What ``make_tokenizer.py`` trains."""

    vocab_size: Positive
    """Upper bound; merges rarer than ``min_frequency`` are not made."""
    min_frequency: Positive
    """Occurrences that a merge needs."""
    number_weight: Positive
    """How often each number of up to three digits is added, so that all become one token."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ModelSettings:
    """A small Qwen3."""

    hidden_size: Positive
    """Width of the residual stream."""
    intermediate_size: Positive
    """Width of the MLP."""
    num_hidden_layers: Positive = 2
    """Layers."""
    num_attention_heads: Positive = 4
    """Query heads."""
    num_key_value_heads: Positive = 2
    """Key and value heads."""
    head_dim: Positive = 32
    """Width of a head."""
    max_position_embeddings: Positive = 1024
    """Longest sequence."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary embedding."""
    embedding_gain: Annotated[float, Field(gt=0)] = 10.0
    """Standard deviation of the embedding, times hidden_size."""
    seed: int = 1
    """Seeds the weights."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ArithmeticSettings:
    """The whole recipe."""

    data: DataSettings
    tokenizer: TokenizerSettings
    teacher: ModelSettings
    student: ModelSettings
