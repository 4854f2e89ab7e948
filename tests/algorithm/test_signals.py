"""The signals of a batch against numbers worked out by hand from the paper's formulas."""

import dataclasses

import numpy as np
import pytest

from sod_mcore.algorithm.signals import compute_signals
from sod_mcore.config import AlgorithmConfig, TopKConfig
from sod_mcore.trajectory import Trajectory

# Reference vector V2: three steps with d = 0.2, 0.4, 0.1 and w = 1, 0.5, 1.2.
STUDENT = [-0.5, -0.7, 0.0, -1.0, -1.4, 0.0, -0.3, -0.2]
TEACHER = [-0.3, -0.5, 0.0, -0.6, -1.0, 0.0, -0.2, -0.3]
MASK = [1, 1, 0, 1, 1, 0, 1, 1]
TURN = [0, 0, -1, 1, 1, -1, 2, 2]
TOKEN_WEIGHTS = [1, 1, 0, 0.5, 0.5, 0, 1.2, 1.2]
LOG_RATIO = [0.2, 0.2, 0, 0.4, 0.4, 0, 0.1, -0.1]


def trajectory(
    group_id: str = "g", reward: float = 1.0, teacher: list[float] | None = None
) -> Trajectory:
    """V2 behind a prompt of one token."""
    mask = np.array([0, *MASK], bool)
    scores = np.array([0.0, *(teacher or TEACHER)], np.float32)
    return Trajectory(
        token_ids=np.arange(9, dtype=np.int32),
        loss_mask=mask,
        turn_index=np.array([-1, *TURN], np.int16),
        rollout_logprobs=np.where(mask, np.array([0.0, *STUDENT]) - 0.1, np.nan).astype(np.float32),
        teacher_logprobs=np.where(mask, scores, np.nan).astype(np.float32),
        weight_version=np.where(mask, 0, -1).astype(np.int32),
        prompt_length=1,
        group_id=group_id,
        reward=reward,
        is_correct=reward > 0,
    )


def old_logprobs() -> np.ndarray:
    mask = np.array([0, *MASK], bool)
    return np.where(mask, np.array([0.0, *STUDENT]), np.nan).astype(np.float32)


def test_reference_vector_v2_with_group_advantages() -> None:
    batch = [trajectory(reward=1.0), trajectory(reward=-1.1)]
    signals = compute_signals(batch, [old_logprobs()] * 2, AlgorithmConfig())
    first, second = signals.trajectories
    np.testing.assert_allclose(first.token_weights[1:], TOKEN_WEIGHTS, atol=1e-5)
    np.testing.assert_allclose(first.step_divergence, [0.2, 0.4, 0.1], atol=1e-5)
    np.testing.assert_allclose(first.step_weights, [1.0, 0.5, 1.2], atol=1e-5)
    assert first.step_lengths.tolist() == [2, 2, 2]
    # Vector G1: R = {1, -1.1} gives advantages of +-0.707106.
    weighted = np.multiply(TOKEN_WEIGHTS, LOG_RATIO)
    np.testing.assert_allclose(
        first.advantages[1:], 0.707106 * np.array(MASK) + weighted, atol=1e-5
    )
    np.testing.assert_allclose(
        second.advantages[1:], -0.707106 * np.array(MASK) + weighted, atol=1e-5
    )
    assert signals.reverse_kl == pytest.approx(-np.mean([0.2, 0.2, 0.4, 0.4, 0.1, -0.1]))
    assert signals.mean_step_divergence == pytest.approx(0.7 / 3)
    assert signals.mean_step_weight == pytest.approx(2.7 / 3)


def test_uniform_weighting_is_plain_distillation() -> None:
    config = AlgorithmConfig(weighting="uniform", grpo_coefficient=0.0)
    (only,) = compute_signals([trajectory()], [old_logprobs()], config).trajectories
    np.testing.assert_allclose(only.advantages[1:], LOG_RATIO, atol=1e-6)
    assert only.token_weights[1:].tolist() == MASK
    assert only.step_weights.tolist() == [1.0, 1.0, 1.0]


def test_an_unscored_trajectory_leaves_the_loss_but_not_its_group() -> None:
    unscored = dataclasses.replace(
        trajectory(reward=-1.1), teacher_logprobs=np.full(9, np.nan, np.float32)
    )
    signals = compute_signals([trajectory(), unscored], [old_logprobs()] * 2, AlgorithmConfig())
    assert signals.num_unscored == 1
    assert signals.trajectories[0].group_advantage == pytest.approx(0.707106, abs=1e-5)
    assert not signals.trajectories[1].loss_mask.any()
    assert not signals.trajectories[1].advantages.any()


def test_without_a_teacher_only_the_reward_counts() -> None:
    config = AlgorithmConfig(distillation="none")
    batch = [
        dataclasses.replace(trajectory(reward=r), teacher_logprobs=np.full(9, np.nan, np.float32))
        for r in (1.0, -1.1)
    ]
    signals = compute_signals(batch, [old_logprobs()] * 2, config)
    first = signals.trajectories[0]
    np.testing.assert_allclose(first.advantages[1:], 0.707106 * np.array(MASK), atol=1e-5)
    assert first.loss_mask.sum() == sum(MASK)


def test_an_infinite_teacher_logprob_is_floored_and_counted() -> None:
    teacher = [*TEACHER[:3], -np.inf, *TEACHER[4:]]
    config = AlgorithmConfig(grpo_coefficient=0.0)
    signals = compute_signals([trajectory(teacher=teacher)], [old_logprobs()], config)
    (only,) = signals.trajectories
    assert signals.num_floored == 1
    assert np.isfinite(only.advantages).all()
    # d_2 = (|-1 + 50| + 0.4) / 2, and the third step recovers (the telescoped form, V10).
    np.testing.assert_allclose(only.step_weights, [1.0, 0.2 / 24.7, 1.2], rtol=1e-4)


def test_top_k_alone_uses_weights_but_no_log_ratio_advantage() -> None:
    config = AlgorithmConfig(distillation="topk_loss", topk=TopKConfig(k=4), grpo_coefficient=0.0)
    (only,) = compute_signals([trajectory()], [old_logprobs()], config).trajectories
    assert not only.advantages.any()
    np.testing.assert_allclose(only.token_weights[1:], TOKEN_WEIGHTS, atol=1e-5)


def test_truncated_importance_sampling_scales_the_advantage() -> None:
    plain = AlgorithmConfig(grpo_coefficient=0.0)
    capped = dataclasses.replace(plain, tis_cap=1.05)
    loose = dataclasses.replace(plain, tis_cap=10.0)
    values = [
        compute_signals([trajectory()], [old_logprobs()], config).trajectories[0].advantages
        for config in (plain, capped, loose)
    ]
    np.testing.assert_allclose(values[1], values[0] * 1.05, rtol=1e-5)
    np.testing.assert_allclose(values[2], values[0] * np.exp(0.1), rtol=1e-5)


def test_weights_after_a_failed_call_follow_the_turns() -> None:
    failing = dataclasses.replace(trajectory(), tool_succeeded=(True, False))
    config = AlgorithmConfig(weighting="failure_mask", grpo_coefficient=0.0)
    first, second = compute_signals(
        [failing, trajectory()], [old_logprobs()] * 2, config
    ).trajectories
    # The call of the second turn failed: the third turn is what comes after it.
    assert first.step_weights.tolist() == [1.0, 1.0, 0.0]
    np.testing.assert_allclose(first.advantages[1:], [*LOG_RATIO[:6], 0.0, 0.0], atol=1e-6)
    assert second.step_weights.tolist() == [1.0, 1.0, 1.0]


def test_a_cap_holds_the_log_ratio_on_both_sides() -> None:
    config = AlgorithmConfig(weighting="uniform", grpo_coefficient=0.0, log_ratio_cap=0.15)
    (only,) = compute_signals([trajectory()], [old_logprobs()], config).trajectories
    expected = np.clip(LOG_RATIO, -0.15, 0.15)
    np.testing.assert_allclose(only.advantages[1:], expected, atol=1e-6)
    assert (expected != LOG_RATIO).any()
