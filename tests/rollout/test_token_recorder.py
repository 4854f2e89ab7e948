"""The recorder's arrays against hand-written ones."""

import numpy as np
import pytest

from sod_mcore.rollout.token_recorder import TokenRecorder


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_marks_exactly_the_sampled_tokens() -> None:
    recorder = TokenRecorder(ids(1, 2, 3))
    recorder.append_turn(ids(4, 5), np.array([-0.5, -0.25], np.float32), ids(7, 7))
    recorder.append_observation(ids(6, 6, 6))
    recorder.append_turn(ids(8), np.array([-1.0], np.float32), ids(9))
    trajectory = recorder.to_trajectory(group_id="g", reward=0.0, is_correct=False)

    assert trajectory.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 6, 6, 8]
    assert trajectory.loss_mask.tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True]
    assert trajectory.turn_index.tolist() == [-1, -1, -1, 0, 0, -1, -1, -1, 1]
    assert trajectory.weight_version.tolist() == [-1, -1, -1, 7, 7, -1, -1, -1, 9]
    nan = np.nan
    np.testing.assert_array_equal(
        trajectory.rollout_logprobs, np.array([nan, nan, nan, -0.5, -0.25, nan, nan, nan, -1.0])
    )
    assert np.isnan(trajectory.teacher_logprobs).all()
    assert not trajectory.is_scored
    assert recorder.response_length == 6


def test_refuses_logprobs_of_another_length() -> None:
    recorder = TokenRecorder(ids(1))
    with pytest.raises(ValueError, match="a turn of 2 tokens came with"):
        recorder.append_turn(ids(4, 5), np.array([-0.5], np.float32), ids(7, 7))
