"""Arithmetic problems: their answers are true, their verifier agrees, and none comes twice."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from dataclasses import asdict

import pytest

from examples.arithmetic.problems import Problem, problem_stream
from examples.arithmetic.settings import FamilyShares
from sod_mcore.data import normalized_question
from sod_mcore.rewards.reasoning_gym import ReasoningGymGrader

SHARES = FamilyShares(
    chain_sum=0.3, products=0.15, basic_arithmetic=0.1, two_step=0.25, three_step=0.2
)
CALLS = {"two_step": 2, "three_step": 3}
DEMO_QUESTIONS = "dfc81d960f247d2e93cd8ccead9ab733c961f89171680926d38086f4bd1d1108"
"""SHA-256 of the first 2,000 questions of ``recipe.yaml``, from before chains of three calls."""


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
    grader = ReasoningGymGrader()
    for problem in PROBLEMS[:200]:
        for answer, is_correct in ((problem.answer, True), (str(int(problem.answer) + 1), False)):
            box = f"\\boxed{{{answer}}}"
            verdict = grader(box, problem.answer, problem.verifier_info)
            assert (verdict.category == "right") is is_correct, (problem, answer)


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


def test_each_later_call_needs_the_result_before() -> None:
    for problem in PROBLEMS:
        later = CALLS.get(problem.family, 1) - 1
        assert [step.count("{}") for step in problem.steps] == [0, *[1] * later], problem


def test_a_chain_of_calls_reads_as_a_question() -> None:
    problem = next(p for p in PROBLEMS if p.family == "three_step")
    first, *later = problem.steps
    rest = "".join(f" and then {step.removeprefix('{} ')}" for step in later)
    assert problem.question == f"Calculate {first}{rest}."


def test_results_of_chains_stay_short() -> None:
    """A small model copies them, three digits a token."""
    chains = [p for p in PROBLEMS if p.family == "three_step"]
    assert all(sum("*" in step for step in p.steps[1:]) <= 1 for p in chains)
    assert max(abs(int(p.answer)) for p in chains) < 300_000


def test_a_family_with_share_zero_changes_nothing() -> None:
    """So that the problems of ``make demo`` are those its committed teacher has not seen."""
    old = FamilyShares(chain_sum=0.4, products=0.15, basic_arithmetic=0.1, two_step=0.35)
    assert old.three_step == 0.0
    questions = "".join(p.question for p in draw(2000, seed=1, shares=old))
    assert hashlib.sha256(questions.encode()).hexdigest() == DEMO_QUESTIONS


def test_an_exhausted_family_is_an_error() -> None:
    smallest = FamilyShares(chain_sum=0, products=0, basic_arithmetic=1, two_step=0)
    with pytest.raises(ValueError, match="no new problem after"):
        draw(1_000_000, shares=smallest)
