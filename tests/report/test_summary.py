"""Numbers about a batch, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sod_mcore.report.summary import summarise_rollout
from sod_mcore.trajectory import RecordedBatch, Trajectory


def trajectory(
    reward: float,
    *,
    turns: tuple[int, ...] = (2,),
    tools: tuple[bool, ...] = (),
    source: str = "sums",
    end_reason: str = "answer",
    scored: bool = True,
    versions: tuple[int, ...] = (0,),
    parts: dict[str, float] | None = None,
) -> Trajectory:
    """Four prompt tokens; ``turns`` sampled tokens each, and one observed token between turns.

    Turn k is sampled by weight version ``versions[k]``, the last one for all that follow.
    """
    index = [-1] * 4
    for turn, length in enumerate(turns):
        index += [-1] * (turn > 0) + [turn] * length
    turn_index = np.array(index, np.int16)
    sampled = turn_index >= 0
    logprobs = np.where(sampled, np.float32(-1), np.float32(np.nan))
    return Trajectory(
        token_ids=np.zeros(len(index), np.int32),
        loss_mask=sampled,
        turn_index=turn_index,
        rollout_logprobs=logprobs,
        teacher_logprobs=logprobs if scored else np.full(len(index), np.nan, np.float32),
        weight_version=np.array([_version(turn, versions) for turn in index], np.int32),
        prompt_length=4,
        group_id="g",
        reward=reward,
        is_correct=reward > 0,
        category="right" if reward > 0 else "wrong",
        reward_parts=parts or {},
        tool_succeeded=tools,
        end_reason=end_reason,
        data_source=source,
    )


def _version(turn: int, versions: tuple[int, ...]) -> int:
    return -1 if turn < 0 else versions[min(turn, len(versions) - 1)]


def batch(*trajectories: Trajectory, num_dropped: int = 0, num_retries: int = 0) -> RecordedBatch:
    return RecordedBatch(trajectories, 5, 0, num_dropped, num_retries)


BATCH = (
    trajectory(1.0, turns=(3, 2), tools=(True,), parts={"outcome": 1.0}),
    trajectory(-1.0, turns=(3, 2, 1), tools=(False, True), parts={"outcome": -1.0, "length": 0.5}),
    trajectory(-1.0, turns=(8,), end_reason="length", scored=False),
    trajectory(1.0, turns=(2,), source="products"),
)


def test_a_batch_by_hand() -> None:
    assert summarise_rollout(batch(*BATCH, num_dropped=3, num_retries=2)) == pytest.approx(
        {
            "rollout/trajectories": 4,
            "rollout/dropped": 3,
            "rollout/retries": 2,
            "rollout/unscored": 1,
            "reward/mean": 0.0,
            "reward/std": 1.0,
            "reward/solved": 0.5,
            "reward/solved/products": 1.0,
            "reward/solved/sums": 1 / 3,
            "reward/category/right": 0.5,
            "reward/category/wrong": 0.5,
            "reward/part/outcome": 0.0,
            "reward/part/length": 0.5,
            "rollout/tool_calls": 3 / 4,
            "rollout/failed_call_share": 1 / 4,
            "rollout/failed_calls": 1 / 3,
            "rollout/prompt_tokens": 4,
            "rollout/response_tokens": (6 + 8 + 8 + 2) / 4,
            "rollout/response_tokens_max": 8,
            "rollout/sampled_tokens": (5 + 6 + 8 + 2) / 4,
            "rollout/turns": 7 / 4,
            "rollout/turns_max": 3,
            "rollout/end/answer": 3 / 4,
            "rollout/end/length": 1 / 4,
            "rollout/staleness": 0.0,
            "rollout/staleness_max": 0.0,
            "rollout/mixed_versions": 0.0,
        }
    )


def test_without_a_teacher_nothing_counts_as_unscored() -> None:
    assert "rollout/unscored" not in summarise_rollout(batch(*BATCH), with_teacher=False)


def test_without_calls_there_is_no_share_of_failed_calls() -> None:
    metrics = summarise_rollout(batch(trajectory(1.0)))
    assert metrics["rollout/failed_call_share"] == 0.0
    assert "rollout/failed_calls" not in metrics


def test_a_batch_that_was_dropped_whole_has_counts_only() -> None:
    assert summarise_rollout(batch(num_dropped=5)) == {
        "rollout/trajectories": 0.0,
        "rollout/dropped": 5.0,
        "rollout/retries": 0.0,
        "rollout/unscored": 0.0,
    }


def test_staleness_counts_tokens_behind_the_trained_weights() -> None:
    mixed = trajectory(1.0, turns=(3, 1), versions=(5, 7))
    metrics = summarise_rollout(
        RecordedBatch((mixed, trajectory(1.0, turns=(2,), versions=(7,))), 7, 7, 0)
    )
    assert metrics["rollout/staleness"] == pytest.approx(3 * 2 / 6)
    assert metrics["rollout/staleness_max"] == 2
    assert metrics["rollout/mixed_versions"] == 0.5
