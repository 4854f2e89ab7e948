"""Flooring of impossible tokens, and the refusal of missing scores."""

import math

import pytest
import torch

from sod_mcore.algorithm import compute_step_weights, distillation_advantages, floor_logprobs


def test_values_below_the_floor_are_raised_and_counted() -> None:
    logprobs = torch.tensor([[-math.inf, -60.0, -50.0, -0.5]])
    floored, count = floor_logprobs(logprobs)
    assert floored.tolist() == [[-50.0, -50.0, -50.0, -0.5]]
    assert count == 2
    assert logprobs[0, 0] == -math.inf


def test_missing_scores_are_not_filled_in() -> None:
    floored, count = floor_logprobs(torch.tensor([math.nan, -math.inf]), floor=-20.0)
    assert math.isnan(floored[0])
    assert floored[1] == -20.0
    assert count == 1


@pytest.mark.parametrize("floor", [0.0, 1.0, -math.inf, math.nan])
def test_floor_must_be_finite_and_negative(floor: float) -> None:
    with pytest.raises(ValueError, match="floor="):
        floor_logprobs(torch.zeros(1), floor=floor)


def test_a_floored_teacher_gives_a_finite_advantage() -> None:
    student = torch.tensor([[-1.0, 0.0, -1.0]])
    mask = torch.tensor([[1, 0, 1]])
    teacher, count = floor_logprobs(torch.tensor([[-1.5, math.nan, -math.inf]]))
    weights = compute_step_weights(student, teacher, mask).token_weights
    advantages = distillation_advantages(student, teacher, weights, mask)
    assert count == 1
    # d = 0.5 and 49, so the second step's -49 arrives as -0.5: the weight undoes the drift.
    torch.testing.assert_close(advantages, torch.tensor([[-0.5, 0.0, -0.5]]), atol=1e-5, rtol=0)


def test_an_infinite_teacher_is_refused_where_it_would_become_nan() -> None:
    ones = torch.ones(1, 2)
    teacher = torch.tensor([[-0.5, -math.inf]])
    with pytest.raises(ValueError, match=r"teacher_logprobs holds 1 unusable"):
        distillation_advantages(-ones, teacher, ones, ones)
