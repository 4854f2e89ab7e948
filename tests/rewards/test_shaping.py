"""Shaping of rewards, against the vectors M1 and O1 of the reference inventory."""

from typing import get_args

import pytest

from sod_mcore.config import RewardConfig
from sod_mcore.rewards import RewardScale, Verdict, overlong_penalty, shape, tool_use_shaping
from sod_mcore.rewards.shaping import ToolUse


@pytest.mark.parametrize(
    ("mode", "tool_calls", "shaped"),
    [
        ("none", 3, -1.0),
        ("released", 0, -1.1),
        ("released", 7, -1.1),
        ("intended", 0, -1.0),
        ("intended", 1, -0.9),
        ("intended", 4, -0.6),
        ("intended", 15, -0.6),
    ],
)
def test_wrong_answers_by_tool_calls(mode: ToolUse, tool_calls: int, shaped: float) -> None:
    assert tool_use_shaping(-1.0, tool_calls, mode) == pytest.approx(shaped)


@pytest.mark.parametrize("mode", get_args(ToolUse))
@pytest.mark.parametrize("reward", [0.0, 0.25, 1.0])
def test_rewards_of_zero_and_more_are_not_shaped(mode: ToolUse, reward: float) -> None:
    assert tool_use_shaping(reward, 5, mode) == reward


@pytest.mark.parametrize(
    ("length", "buffer", "penalty"),
    [
        (19456, 1024, 0.0),
        (19457, 1024, -0.000977),
        (19968, 1024, -0.5),
        (20480, 1024, -1.0),
        (18432, 4096, -0.5),
        (0, 1024, 0.0),
        (30000, 1024, -1.0),
    ],
)
def test_overlong_penalty(length: int, buffer: int, penalty: float) -> None:
    assert overlong_penalty(length, 20480, buffer) == pytest.approx(penalty, abs=5e-7)
    assert overlong_penalty(length, 20480, buffer, factor=0.5) == pytest.approx(
        penalty / 2, abs=5e-7
    )


@pytest.mark.parametrize("buffer", [0, -1, 20481])
def test_overlong_penalty_needs_a_buffer(buffer: int) -> None:
    with pytest.raises(ValueError, match=f"buffer_length = {buffer}"):
        overlong_penalty(10, 20480, buffer)


def test_the_whole_reward_of_a_long_wrong_answer() -> None:
    """-1 + 0.1 for one tool call - 0.5 for length; the parts say so, those of the grader stay."""
    wrong = RewardScale().result(Verdict("wrong", "13", parts={"own": 2.0}))
    config = RewardConfig(tool_use="intended", overlong_buffer=1024)
    result = shape(wrong, config, tool_calls=1, response_tokens=19968, max_response_tokens=20480)
    assert result.reward == pytest.approx(-1.4)
    assert result.parts == pytest.approx({"own": 2.0, "tool_use": 0.1, "overlong": -0.5})
    assert (result.category, result.prediction) == ("wrong", "13")


def test_nothing_is_added_by_default() -> None:
    right = RewardScale().result(Verdict("right", "12"))
    result = shape(
        right, RewardConfig(), tool_calls=3, response_tokens=20480, max_response_tokens=20480
    )
    assert result == right


def test_a_share_of_tests_is_the_reward_whatever_a_wrong_answer_costs() -> None:
    scale = RewardScale(correct=2.0, wrong=-3.0)
    assert scale.result(Verdict("wrong", share=0.25)).reward == 0.5
    assert scale.result(Verdict("right", share=1.0)).reward == 2.0
    assert scale.result(Verdict("timeout")).reward == -3.0
