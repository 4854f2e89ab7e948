"""Demonstrations: observations are what the sandboxed tool says, habits are as often as set."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections import Counter

import pytest

from examples.arithmetic.demonstrations import (
    FAILING_PROGRAMS,
    TOOL,
    TOOL_OUTPUT_RULE,
    copy_exercise,
    demonstrate,
    run_program,
    without_answer,
)
from examples.arithmetic.experiment import CASCADE
from examples.arithmetic.make_data import prompt_row
from examples.arithmetic.problems import Problem, problem_stream
from examples.arithmetic.settings import AgentHabits, CopyShares, FamilyShares
from sod_mcore.config import SodConfig
from sod_mcore.config_file import load_config
from sod_mcore.rollout.teacher import teacher_messages
from sod_mcore.tools import CodeInterpreter, Sandbox, ToolResult
from sod_mcore.trajectory import Message, Prompt
from tests.end_to_end.programs import REPOSITORY

SHARES = FamilyShares(
    chain_sum=0.3, products=0.2, basic_arithmetic=0.1, two_step=0.2, three_step=0.2
)
PROBLEMS = list(itertools.islice(problem_stream(5, SHARES), 400))
CAREFUL = AgentHabits(conversations=1)


def habits(**changes: float | bool) -> AgentHabits:
    return AgentHabits(**{"conversations": 1, "fails_again": 0.0, **changes})  # type: ignore[arg-type]


def programs(messages: list[Message]) -> list[str]:
    return [
        call["function"]["arguments"]["code"]
        for message in messages
        for call in message.get("tool_calls", [])
    ]


def by_family(family: str) -> list[Problem]:
    return [p for p in PROBLEMS if p.family == family]


def test_observations_are_those_of_the_sandboxed_tool() -> None:
    expressions = ["57 + 87", "999 * 999", "-5 - 70 * 3"]
    sample = [f"print({e})" for e in expressions] + [
        make(e) for make in FAILING_PROGRAMS.values() for e in expressions
    ]

    async def run_all() -> list[ToolResult]:
        async with Sandbox(max_concurrency=2, warm_count=2) as sandbox:
            tool = CodeInterpreter(sandbox, TOOL_OUTPUT_RULE)
            assert tool.schema == TOOL
            return [await tool.call({"code": code}) for code in sample]

    results = asyncio.run(run_all())
    assert [run_program(code) for code in sample] == [result.text for result in results]
    assert [result.succeeded for result in results] == [True] * 3 + [False] * (len(sample) - 3)


def test_a_careful_agent_is_right() -> None:
    rng = random.Random(0)
    for problem in PROBLEMS:
        messages = demonstrate(problem, CAREFUL, rng)
        assert len(programs(messages)) == len(problem.steps)
        assert messages[-1]["content"] == f"\\boxed{{{problem.answer}}}"
        roles = [m["role"] for m in messages]
        assert roles == ["user", *["assistant", "tool"] * len(problem.steps), "assistant"]


def test_an_agent_that_repairs_its_calls_is_right_too() -> None:
    rng = random.Random(0)
    for problem in PROBLEMS:
        messages = demonstrate(problem, habits(fails=1.0, learns_failing_calls=False), rng)
        assert len(programs(messages)) == 2 * len(problem.steps)
        assert messages[-1]["content"] == f"\\boxed{{{problem.answer}}}"
        calls = [m for m in messages if m.get("tool_calls")]
        assert [call["loss"] for call in calls] == [False, True] * len(problem.steps)
        errors = [m["content"] for m in messages if m["role"] == "tool"][0::2]
        assert all(re.match(r"(SyntaxError|NameError): ", error) for error in errors)


def test_failing_calls_are_bounded_and_may_carry_loss() -> None:
    problem = by_family("products")[0]
    messages = demonstrate(problem, habits(fails=1.0, fails_again=1.0), random.Random(0))
    assert len(programs(messages)) == 3
    assert all(message.get("loss", True) for message in messages)


def test_giving_up_and_stopping_early_end_with_a_wrong_answer() -> None:
    rng = random.Random(0)
    problem = by_family("two_step")[0]
    gave_up = demonstrate(problem, habits(fails=1.0, gives_up=1.0), rng)
    assert (len(programs(gave_up)), gave_up[-1]["content"]) == (1, "\\boxed{unknown}")
    stopped = demonstrate(problem, habits(stops_early=1.0), rng)
    first = eval(problem.steps[0])
    assert (len(programs(stopped)), stopped[-1]["content"]) == (1, f"\\boxed{{{first}}}")


def test_an_agent_may_stop_after_any_step_but_the_last() -> None:
    rng = random.Random(0)
    problem = by_family("three_step")[0]
    calls = Counter(
        len(programs(demonstrate(problem, habits(stops_early=0.5), rng))) for _ in range(2000)
    )
    assert [calls[n] / 2000 for n in (1, 2, 3)] == pytest.approx([0.5, 0.25, 0.25], abs=0.04)


def test_an_agent_that_is_told_the_answer_goes_on_until_it_is_there() -> None:
    rng = random.Random(0)
    problem = by_family("three_step")[0]
    sloppy = habits(fails=0.5, gives_up=1.0, stops_early=1.0, told=1.0)
    for messages in (demonstrate(problem, sloppy, rng) for _ in range(50)):
        told = f"\\boxed{{{problem.answer}}}"
        assert messages[0]["content"] == problem.question + told
        assert without_answer(messages[0]["content"]) == problem.question
        assert messages[-1]["content"] == told
        assert len(programs(messages)) >= 3


def test_the_self_teacher_is_told_the_answer_in_the_same_words() -> None:
    problem = by_family("three_step")[0]
    shown = demonstrate(problem, habits(told=1.0), random.Random(0))[0]["content"]
    config = load_config(SodConfig, REPOSITORY / CASCADE / "recipes" / "opsd_gt.yaml")
    row = prompt_row(problem, 0)
    prompt = Prompt(
        prompt_id="eval/0",
        data_source=row["data_source"],
        messages=row["prompt"],
        ground_truth=row["reward_model"]["ground_truth"],
        extra_info=row["extra_info"],
    )
    assert teacher_messages(config.teacher, prompt)[0]["content"] == shown


@pytest.mark.parametrize("rate", [0.25, 0.6])
def test_rates_are_met(rate: float) -> None:
    rng = random.Random(0)
    problem = by_family("chain_sum")[0]
    failed = [len(programs(demonstrate(problem, habits(fails=rate), rng))) > 1 for _ in range(2000)]
    assert sum(failed) / 2000 == pytest.approx(rate, abs=0.04)


def test_copy_exercises_practise_one_turn() -> None:
    rng = random.Random(0)
    one, two = by_family("chain_sum")[0], by_family("two_step")[0]
    first, second, answer = (
        CopyShares(first_call=a, second_call=b, answer=c)
        for a, b, c in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    )
    for exercise in (copy_exercise(one, first, rng), copy_exercise(one, second, rng)):
        assert [m["role"] for m in exercise] == ["user", "assistant"]
        assert programs(exercise) == [f"print({one.steps[0]})"]
    exercise = copy_exercise(one, answer, rng)
    assert [m["role"] for m in exercise] == ["tool", "assistant"]
    assert exercise[1]["content"] == f"\\boxed{{{one.answer}}}"
    exercise = copy_exercise(two, second, rng)
    assert [m.get("loss") for m in exercise] == [None, False, None, True]
    assert str(eval(programs(exercise)[1].removeprefix("print"))) == two.answer


def test_copy_exercises_practise_all_later_calls_of_a_chain() -> None:
    three = by_family("three_step")[0]
    later = CopyShares(first_call=0, second_call=1, answer=0)
    exercise = copy_exercise(three, later, random.Random(0))
    roles = ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [m["role"] for m in exercise] == roles
    assert [m["loss"] for m in exercise if m["role"] == "assistant"] == [False, True, True]
    assert str(eval(programs(exercise)[2].removeprefix("print"))) == three.answer
