"""Large answers: what is not read, and that the event loop goes on meanwhile."""

import asyncio
import json
import time
from collections.abc import Awaitable, Mapping
from typing import Any

import pytest

from sod_mcore.rewards.code import cases as code_cases
from sod_mcore.rewards.code.cases import CallCase, ExpectedValue, StdinCase
from tests.rewards.code_helpers import FakeRunner, finished


def reporting(value_text: str) -> FakeRunner:
    """A runner whose driver reports a value, given as JSON text."""

    def answer(stdin: str) -> code_cases.SandboxResult:
        return finished(f'\n{json.loads(stdin)["marker"]}{{"value": {value_text}}}\n')

    return FakeRunner(answer)


def case(expected: object, text: str | None = None) -> CallCase:
    return CallCase(["P"], "f", [], ExpectedValue(expected, text))


async def longest_pause(work: Awaitable[object]) -> float:
    """Seconds for which the event loop did nothing else while the work was done."""
    longest, done = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal longest
        while not done.is_set():
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.01)
    await work
    done.set()
    await watching
    return longest


@pytest.mark.asyncio
async def test_far_more_than_expected_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = code_cases._read_report

    def read_report(text: str) -> Mapping[str, Any]:
        read.append(len(text))
        return original(text)

    monkeypatch.setattr(code_cases, "_read_report", read_report)
    runner = reporting("[" + "0," * 8_000_000 + "0]")
    assert await case([0], "[0]").run(runner) == "failed"
    assert await case([0] * 1000).run(runner) == "failed"
    assert read == []


@pytest.mark.asyncio
async def test_the_longest_spelling_is_read() -> None:
    expected = "[" + "0.0," * 30_000 + "0.0]"
    runner = reporting("[" + "-1.2345678901234567e-16, " * 30_000 + "-1.2345678901234567e-16]")
    assert await case(json.loads(expected), expected).run(runner) == "passed"
    signs = "😀" * 30_000
    runner = reporting(json.dumps(signs))
    assert await case(signs, json.dumps(signs, ensure_ascii=False)).run(runner) == "passed"
    assert await case("no").run(runner) == "failed"


@pytest.mark.asyncio
async def test_a_long_report_of_a_check_is_no_pass() -> None:
    def answer(stdin: str) -> code_cases.SandboxResult:
        report = {"passed": True, "more": "x" * 100_000}
        return finished(json.loads(stdin)["marker"] + json.dumps(report))

    check = code_cases.CheckCase(["P"], "f", "", "def check(candidate): ...")
    assert await check.run(FakeRunner(answer)) == "failed"


@pytest.mark.asyncio
async def test_the_event_loop_goes_on_while_long_texts_are_compared() -> None:
    text = "0.50 1\n" * 300_000
    runner = FakeRunner(lambda stdin: finished(text.replace("0.50", "0.5")))
    started = time.monotonic()
    pause = await longest_pause(StdinCase("P", "", text).run(runner))
    assert pause < (time.monotonic() - started) / 2
