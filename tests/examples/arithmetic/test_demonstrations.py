"""Demonstrations: observations are what the sandboxed tool says, habits are as often as set."""

from __future__ import annotations

import asyncio
import itertools
import random
import re

import pytest

from examples.arithmetic.demonstrations import (
    FAILING_PROGRAMS,
    TOOL,
    TOOL_OUTPUT_RULE,
    copy_exercise,
    demonstrate,
    run_program,
)
from examples.arithmetic.problems import Problem, problem_stream
from examples.arithmetic.settings import AgentHabits, CopyShares, FamilyShares
from sod_mcore.tools import CodeInterpreter, Sandbox, ToolResult
from sod_mcore.trajectory import Message

SHARES = FamilyShares(chain_sum=0.4, products=0.2, basic_arithmetic=0.1, two_step=0.3)
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
