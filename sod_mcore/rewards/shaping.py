"""What is added to the reward of a verdict: for tool calls on wrong answers, and for length."""

import dataclasses
from typing import Literal

from sod_mcore.config import RewardConfig
from sod_mcore.rewards.interface import RewardResult

ToolUse = Literal["none", "intended", "released"]

_REWARD_PER_CALL = 0.1
_HIGHEST_SHAPED_REWARD = -0.6


def shape(
    result: RewardResult,
    config: RewardConfig,
    *,
    tool_calls: int,
    response_tokens: int,
    max_response_tokens: int,
) -> RewardResult:
    """The reward with what ``reward.tool_use`` and ``reward.overlong_buffer`` add to it.

    Args:
        result: the verdict's own reward.
        config: what is switched on.
        tool_calls: calls that were executed in the trajectory.
        response_tokens: tokens after the prompt, observations included.
        max_response_tokens: their limit, ``rollout.max_response_tokens``.

    Returns:
        A result whose parts hold "tool_use" and "overlong", each where it is switched on.
    """
    added = {}
    if config.tool_use != "none":
        shaped = tool_use_shaping(result.reward, tool_calls, config.tool_use)
        added["tool_use"] = shaped - result.reward
    if config.overlong_buffer:
        added["overlong"] = overlong_penalty(
            response_tokens,
            max_response_tokens,
            config.overlong_buffer,
            factor=config.overlong_factor,
        )
    reward = result.reward + sum(added.values())
    return dataclasses.replace(result, reward=reward, parts={**result.parts, **added})


def tool_use_shaping(reward: float, tool_calls: int, mode: ToolUse) -> float:
    """The reference's bonus on negative rewards: ``min(-0.6, reward + 0.1 n)`` for n tool calls.

    The formula is ``min(-0.6, reward + 0.1 (num_turns - 2) / 2)`` with ``num_turns = 2 n + 2``
    (the public implementation of arXiv 2605.07725). As it was released, the number of turns never
    reaches it and counts as 0: every wrong answer then loses 0.1.

    Args:
        reward: unchanged unless it is negative.
        tool_calls: n.
        mode: "none" changes nothing, "intended" is the formula, "released" the formula with
            ``num_turns = 0``.
    """
    if mode == "none" or reward >= 0:
        return reward
    counted = tool_calls if mode == "intended" else -1
    return min(_HIGHEST_SHAPED_REWARD, reward + _REWARD_PER_CALL * counted)


def overlong_penalty(
    response_length: int, max_response_length: int, buffer_length: int, *, factor: float = 1.0
) -> float:
    """A penalty that grows linearly over the last `buffer_length` tokens (DAPO, arXiv 2503.14476,
    equation 13; past the limit it stays at its largest).

    Args:
        response_length: tokens of the response, observations included.
        max_response_length: the limit, tokens.
        buffer_length: tokens before the limit over which the penalty grows.
        factor: the penalty at the limit.

    Returns:
        0 up to `max_response_length - buffer_length`, `-factor` from `max_response_length` on.

    Raises:
        ValueError: the buffer is empty or longer than the limit.
    """
    if not 0 < buffer_length <= max_response_length:
        raise ValueError(
            f"buffer_length = {buffer_length}: give 1 to max_response_length = "
            f"{max_response_length} tokens"
        )
    excess = response_length - (max_response_length - buffer_length)
    return -factor * min(max(excess / buffer_length, 0.0), 1.0)
