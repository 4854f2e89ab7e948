"""The rules of step weights, against numbers worked out by hand from their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sod_mcore.algorithm import compute_step_weights
from sod_mcore.algorithm.weighting import (
    RULES,
    StepFacts,
    apply_rule,
    find_rule,
    shrunk_divergence,
)
from sod_mcore.algorithm.weights import StepWeights
from sod_mcore.config import AlgorithmConfig, ConfigError

# Three steps of 2, 2 and 1 tokens with d = 0.2, 0.4, 0.1; and one step of 3 tokens with d = 0.5.
STUDENT = torch.tensor(
    [[-0.5, -0.7, 0, -1.0, -1.4, 0, -0.3], [-1.0, -1.0, -1.0, 0, 0, 0, 0]], dtype=torch.float64
)
GAP = torch.tensor([[0.2, 0.2, 0, 0.4, 0.4, 0, 0.1], [0.5, 0.5, 0.5, 0, 0, 0, 0]])
MASK = GAP != 0


def make_steps() -> StepWeights:
    return compute_step_weights(STUDENT, STUDENT + GAP, MASK)


def weights(first_failure: tuple[int, int] = (9, 9), **settings: Any) -> list[list[float]]:
    """Weights of the steps that there are, and a check that tokens get those of their step."""
    config = AlgorithmConfig(**settings)
    steps = make_steps()
    facts = StepFacts(
        divergence=shrunk_divergence(steps, config.weight_prior_tokens),
        lengths=steps.step_lengths,
        first_failure=torch.tensor(first_failure),
        group_advantages=torch.tensor([math.log(3.0), 0.0]),
    )
    result = apply_rule(steps, facts, config)
    rows = [
        row[: int(count)].tolist()
        for row, count in zip(result.step_weights, result.num_steps, strict=True)
    ]
    for row, index, tokens in zip(rows, steps.step_index, result.token_weights, strict=True):
        assert tokens.tolist() == [row[k] if k >= 0 else 0.0 for k in index.tolist()]
    return rows


def test_sod_is_the_rule_of_compute_step_weights() -> None:
    steps = make_steps()
    ours = weights()
    assert ours[0] == pytest.approx([1.0, 0.5, 1.2], rel=1e-5)
    assert ours[0] == pytest.approx(steps.step_weights[0].tolist(), rel=1e-6)
    assert ours[1] == [1.0]


def test_no_clip_lets_a_step_count_for_more() -> None:
    assert weights(weight_delta=math.inf)[0] == pytest.approx([1.0, 0.5, 2.0], rel=1e-4)


def test_a_floor_of_the_first_divergence_keeps_later_steps_alive() -> None:
    ours = weights(weight_first_divergence_floor=0.3)
    assert ours[0] == pytest.approx([1.0, 0.75, 1.2], rel=1e-4)


def test_uniform() -> None:
    assert weights(weighting="uniform") == [[1.0, 1.0, 1.0], [1.0]]


@pytest.mark.parametrize(
    ("first_failure", "decayed", "masked"),
    [
        (0, [1.0, 0.9, 0.81], [1.0, 0.0, 0.0]),
        (1, [1.0, 1.0, 0.9], [1.0, 1.0, 0.0]),
        (2, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        (9, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    ],
)
def test_after_a_failed_call(first_failure: int, decayed: list[float], masked: list[float]) -> None:
    failures = (first_failure, 9)
    assert weights(failures, weighting="failure_decay")[0] == pytest.approx(decayed)
    assert weights(failures, weighting="failure_mask") == [masked, [1.0]]
    half = weights(failures, weighting="failure_decay", weight_failure_decay=0.5)[0]
    assert half == pytest.approx([0.5 ** round(math.log(w, 0.9)) for w in decayed])


def test_reward_gate_is_open_where_the_reward_was_low() -> None:
    # sigmoid(-log 3) = 1/4, sigmoid(0) = 1/2.
    ours = weights(weighting="reward_gate", weight_gate_max=0.1)
    assert ours[0] == pytest.approx([0.025, 0.025, 0.025])
    assert ours[1] == pytest.approx([0.05])


def test_short_steps_are_drawn_towards_the_mean_of_the_sample() -> None:
    # The first sample's mean over five tokens is (0.4 + 0.8 + 0.1) / 5 = 0.26.
    shrunk = shrunk_divergence(make_steps(), 2.0)
    assert shrunk[0].tolist() == pytest.approx([0.23, 0.33, (0.1 + 0.52) / 3], rel=1e-5)
    assert shrunk[1, 0].item() == pytest.approx(0.5)
    assert shrunk[1, 1:].isnan().all()
    assert weights(weight_prior_tokens=2.0)[0] == pytest.approx(
        [1.0, 0.23 / 0.33, 0.23 / (0.62 / 3)], rel=1e-4
    )


def by_length(facts: StepFacts, config: AlgorithmConfig) -> Tensor:
    """A rule of a user's."""
    return facts.lengths / 2


def negative(facts: StepFacts, config: AlgorithmConfig) -> Tensor:
    return -torch.ones_like(facts.divergence)


def narrow(facts: StepFacts, config: AlgorithmConfig) -> Tensor:
    return torch.ones(2, 1)


def test_a_rule_of_the_users() -> None:
    assert weights(weighting=f"{__name__}:by_length") == [[1.0, 1.0, 0.5], [1.5]]


@pytest.mark.parametrize("rule", ["negative", "narrow"])
def test_impossible_weights_are_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="must give finite weights of at least 0"):
        weights(weighting=f"{__name__}:{rule}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sodd", "it must be one of sod, uniform"),
        ("no_such_module:rule", "cannot be imported"),
        ("sod_mcore.algorithm:no_such_rule", "cannot be imported"),
    ],
)
def test_an_unknown_rule_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"algorithm.weighting is {name!r}.*{message}"):
        find_rule(name)


def test_every_rule_takes_a_batch_without_steps() -> None:
    nothing = torch.zeros(2, 3)
    steps = compute_step_weights(nothing, nothing, nothing)
    facts = StepFacts(
        steps.step_divergence, steps.step_lengths, torch.zeros(2).long(), torch.zeros(2)
    )
    for name in RULES:
        result = apply_rule(steps, facts, AlgorithmConfig(weighting=name))
        assert result.step_weights.shape == (2, 0)
        assert (result.token_weights == 0).all()
