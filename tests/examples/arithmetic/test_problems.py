"""Arithmetic problems: their answers are true, their verifier agrees, and none comes twice."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import asdict

import pytest

from examples.arithmetic.problems import Problem, problem_stream
from examples.arithmetic.settings import FamilyShares
from sod_mcore.data import normalized_question
from sod_mcore.rewards.reasoning_gym import ReasoningGymVerifier

SHARES = FamilyShares(chain_sum=0.4, products=0.15, basic_arithmetic=0.1, two_step=0.35)


def draw(count: int, seed: int = 3, shares: FamilyShares = SHARES) -> list[Problem]:
    return list(itertools.islice(problem_stream(seed, shares), count))


PROBLEMS = draw(2000)


def test_python_computes_the_answer_step_by_step() -> None:
    for problem in PROBLEMS:
        result = ""
        for step in problem.steps:
            result = str(eval(step.format(result)))
        assert result == problem.answer, problem


def test_the_verifier_of_the_package_accepts_the_answer_and_no_other() -> None:
    verifier = ReasoningGymVerifier()
    for problem in PROBLEMS[:200]:
        for answer, is_correct in ((problem.answer, True), (str(int(problem.answer) + 1), False)):
            box = f"\\boxed{{{answer}}}"
            result = verifier.score(box, problem.answer, problem.verifier_info)
            assert result.is_correct is is_correct, (problem, answer)


def test_no_question_comes_twice() -> None:
    assert len({normalized_question(p.question) for p in PROBLEMS}) == len(PROBLEMS)


def test_seeds_decide() -> None:
    assert draw(50) == PROBLEMS[:50]
    shared = {p.question for p in draw(200, seed=4)} & {p.question for p in PROBLEMS[:200]}
    assert len(shared) < 20, "only the smallest problems come again"


def test_families_come_as_often_as_asked() -> None:
    counts = Counter(p.family for p in PROBLEMS)
    for family, share in asdict(SHARES).items():
        assert counts[family] / len(PROBLEMS) == pytest.approx(share, abs=0.04)
    only = FamilyShares(chain_sum=0, products=0, basic_arithmetic=0, two_step=1)
    assert {p.family for p in draw(50, shares=only)} == {"two_step"}


def test_the_second_call_needs_the_first_result() -> None:
    for problem in PROBLEMS:
        assert [step.count("{}") for step in problem.steps] == (
            [0, 1] if problem.family == "two_step" else [0]
        )


def test_an_exhausted_family_is_an_error() -> None:
    smallest = FamilyShares(chain_sum=0, products=0, basic_arithmetic=1, two_step=0)
    with pytest.raises(ValueError, match="no new problem after"):
        draw(1_000_000, shares=smallest)
