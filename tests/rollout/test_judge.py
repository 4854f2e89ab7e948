"""From a finished trajectory to its reward, through real graders and the real sandbox."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import numpy as np
import pytest

from sod_mcore.config import ConfigError, RewardConfig, ToolsConfig
from sod_mcore.rewards import RewardResult
from sod_mcore.rollout.judge import check_verifiers, open_judge
from sod_mcore.rollout.token_recorder import TokenRecorder
from sod_mcore.trajectory import Prompt, Trajectory

ADDITION = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})
HALF_RIGHT = "```python\na, b = map(int, input().split())\nprint(3)\n```"


def trajectory(answer: str, tool_calls: int = 0, tokens: int = 4) -> Trajectory:
    recorder = TokenRecorder(np.array([1], np.int32))
    recorder.append_turn(
        np.full(tokens, 2, np.int32), np.zeros(tokens, np.float32), np.zeros(tokens, np.int32)
    )
    return recorder.to_trajectory(
        group_id="p",
        reward=0.0,
        is_correct=False,
        tool_succeeded=(True,) * tool_calls,
        messages=(
            {"role": "user", "content": r"\boxed{12}"},
            {"role": "assistant", "content": answer},
        ),
    )


def judge(
    config: RewardConfig, rows: list[tuple[str, str, Trajectory]], max_response_tokens: int = 100
) -> list[RewardResult]:
    """Rewards of (data source, ground truth, trajectory)."""

    async def work() -> list[RewardResult]:
        async with AsyncExitStack() as stack:
            sources = [source for source, _, _ in rows]
            tools = ToolsConfig()
            opened = await open_judge(config, tools, sources, max_response_tokens, stack)
            jobs = [opened(Prompt((), truth, source, "p"), t) for source, truth, t in rows]
            return list(await asyncio.gather(*jobs))

    return asyncio.run(work())


def test_each_row_has_the_verifier_of_its_source() -> None:
    results = judge(
        RewardConfig(),
        [
            ("math_dapo", "12", trajectory(r"so \boxed{12.0}")),
            ("math_dapo", "12", trajectory("twelve")),
            ("gpqa_diamond", "B", trajectory(r"\boxed{b}")),
            ("train-code-taco-x", ADDITION, trajectory(HALF_RIGHT)),
            ("train-code-taco-x", ADDITION, trajectory("no program")),
        ],
    )
    assert [(r.category, r.reward) for r in results] == [
        ("right", 1.0),
        ("no_answer", -1.0),
        ("right", 1.0),
        ("wrong", 0.5),
        ("no_answer", -1.0),
    ]


def test_scale_shaping_and_length() -> None:
    config = RewardConfig(
        correct=2.0, wrong=-1.0, tool_use="intended", overlong_buffer=10, math="strict_box"
    )
    rows = [
        ("math_dapo", "12", trajectory(r"\boxed{12}", tool_calls=3)),
        ("math_dapo", "12", trajectory(r"\boxed{ 12}", tool_calls=1)),
        ("math_dapo", "12", trajectory(r"\boxed{13}", tool_calls=9, tokens=15)),
    ]
    results = judge(config, rows, max_response_tokens=20)
    assert [r.reward for r in results] == pytest.approx([2.0, -0.9, -0.6 - 0.5])
    assert results[2].parts["overlong"] == pytest.approx(-0.5)


def test_all_tests_or_nothing() -> None:
    rows = [("train-code-taco-x", ADDITION, trajectory(HALF_RIGHT))]
    assert judge(RewardConfig(code="all"), rows)[0].reward == -1.0


def likes_the_word(response_text: str, ground_truth: str, extra_info: object) -> float:
    """A verifier of a user's: a quarter for each time the ground truth is said."""
    return min(1.0, response_text.count(ground_truth) / 4)


def test_a_verifier_of_ones_own() -> None:
    config = RewardConfig(verifiers={"mine": "tests.rollout.test_judge:likes_the_word"})
    result = judge(config, [("mine/1", "yes", trajectory("yes and yes"))])[0]
    assert (result.category, result.reward) == ("wrong", 0.5)


@pytest.mark.parametrize(
    ("verifiers", "source", "ground_truth", "problem"),
    [
        ({}, "poetry", "1", "rows/0: data_source = 'poetry': no verifier"),
        ({"a": "no.such:thing"}, "a", "1", "reward.verifiers"),
        ({"a": "maths"}, "a", "1", "reward.verifiers names 'maths'; it must be one of"),
        ({}, "math_dapo", "  ", "rows/0: "),
        ({}, "gpqa_diamond", "the second", "rows/0: "),
        ({}, "train-code-taco-x", "{}", "rows/0: "),
        ({}, "reasoning_gym", "1", "rows/0: extra_info['dataset'] = None"),
    ],
)
def test_what_is_wrong_is_found_before_anything_starts(
    verifiers: dict[str, str], source: str, ground_truth: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_verifiers(
            RewardConfig(verifiers=verifiers), [Prompt((), ground_truth, source, "rows/0")]
        )
    assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_usable_rows_are_let_through() -> None:
    rows = [("math_dapo", "12"), ("gpqa_diamond", "B"), ("train-code-taco-x", ADDITION)]
    check_verifiers(RewardConfig(), [Prompt((), truth, source, "rows/0") for source, truth in rows])
