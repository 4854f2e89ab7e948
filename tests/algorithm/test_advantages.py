"""GRPO, distillation and gated advantages against hand-checked vectors and plain statistics."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sod_mcore.algorithm import (
    compute_step_weights,
    distillation_advantages,
    gated_distillation_advantages,
    grpo_advantages,
)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, -1.1], [0.707106, -0.707106]),
        ([1, 1, -1.1, -1.1], [0.866025, 0.866025, -0.866025, -0.866025]),
        ([1, -1.1, -1.1, -1.1], [1.499999, -0.4999995, -0.4999995, -0.4999995]),
        ([1, 0.5, 0, -1.1], [1.002063, 0.445361, -0.111340, -1.336084]),
    ],
)
def test_grpo_vectors(rewards: list[float], expected: list[float]) -> None:
    advantages = grpo_advantages(torch.tensor(rewards), torch.zeros(len(rewards)).long())
    assert advantages.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("reward", [-1.1, 0.1])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(reward: float, size: int) -> None:
    rewards = torch.full((size,), reward, dtype=torch.float64)
    advantages = grpo_advantages(rewards, torch.zeros(size).long())
    assert advantages.tolist() == [0.0] * size


def test_a_group_of_one_has_nothing_to_be_compared_with() -> None:
    rewards, groups = torch.tensor([0.7, 1.0, -1.1]), torch.tensor([4, 9, 9])
    assert grpo_advantages(rewards, groups)[0] == 0.0
    as_reward = grpo_advantages(rewards, groups, single_sample="reward")
    assert as_reward[0] == pytest.approx(0.7 / (1 + 1e-6), abs=1e-7)
    assert as_reward[1] == pytest.approx(0.707106, abs=1e-5)
    plain = grpo_advantages(rewards, groups, single_sample="reward", normalize_by_std=False)
    assert plain.tolist() == pytest.approx([0.7, 1.05, -1.05], abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unknown_rewards_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"rewards is not finite at \[1\]"):
        grpo_advantages(torch.tensor([1.0, bad]), torch.tensor([0, 0]))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="both must be"):
        grpo_advantages(torch.zeros(2), torch.zeros(3).long())
    with pytest.raises(ValueError, match="single_sample="):
        grpo_advantages(torch.zeros(2), torch.zeros(2).long(), single_sample="mean")  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.floats(-5, 5, width=32), st.integers(-3, 3)), min_size=0, max_size=30),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_grpo_equals_plain_statistics(samples: list[tuple[float, int]], normalize: bool) -> None:
    rewards = torch.tensor([r for r, _ in samples], dtype=torch.float64)
    groups = torch.tensor([g for _, g in samples], dtype=torch.long)
    advantages = grpo_advantages(rewards, groups, normalize_by_std=normalize)
    for (reward, group), advantage in zip(samples, advantages.tolist(), strict=True):
        members = [r for r, g in samples if g == group]
        expected = 0.0
        if len(members) > 1:
            expected = reward - statistics.fmean(members)
            if normalize:
                expected /= statistics.stdev(members) + 1e-6
        assert advantage == pytest.approx(expected, abs=1e-8)


def test_distillation_vector() -> None:
    student = torch.tensor([[-0.5, -0.7, 0, -1, -1.4, 0, -0.3, -0.2]], requires_grad=True)
    teacher = torch.tensor([[-0.3, -0.5, 0, -0.6, -1, 0, -0.2, -0.3]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1]]).bool()
    weights = compute_step_weights(student, teacher, mask).token_weights
    advantages = distillation_advantages(student, teacher, weights, mask)
    expected = torch.tensor([[0.2, 0.2, 0, 0.2, 0.2, 0, 0.12, -0.12]])
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)
    assert not advantages.requires_grad
    total = advantages + 0.70711 * mask
    expected_total = [0.90711, 0.90711, 0, 0.90711, 0.90711, 0, 0.82711, 0.58711]
    assert total[0].tolist() == pytest.approx(expected_total, abs=1e-5)
    half = distillation_advantages(student, teacher, weights, mask, coefficient=0.5)
    torch.testing.assert_close(half, expected / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_outside_the_mask_never_enters_an_advantage(garbage: float) -> None:
    student = torch.tensor([[garbage, -1.0]])
    teacher = torch.tensor([[0.0, -0.5]])
    mask = torch.tensor([[0, 1]])
    weights = torch.tensor([[garbage, 1.0]])
    assert distillation_advantages(student, teacher, weights, mask).tolist() == [[0.0, 0.5]]
    gated = gated_distillation_advantages(torch.zeros(1), student, teacher, mask)
    assert gated.tolist() == [[0.0, pytest.approx(0.025)]]


@pytest.mark.parametrize(
    ("advantage", "expected"), [(0.7071, [0.71370, 0.69389]), (-0.7071, [-0.69370, -0.73389])]
)
def test_gated_vector(advantage: float, expected: list[float]) -> None:
    student = torch.tensor([[-1.0, -1.0]])
    teacher = student + torch.tensor([[0.2, -0.4]])
    total = gated_distillation_advantages(
        torch.tensor([advantage]), student, teacher, torch.ones(1, 2)
    )
    assert total[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_gate_range_is_checked() -> None:
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"beta_min=0\.2 and beta_max=0\.1"):
        gated_distillation_advantages(ones[0], ones, ones, ones, beta_min=0.2)
