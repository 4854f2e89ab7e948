"""Verifier for programs: runs the final turn's program on the tests of the data row.

The verdict never rests on what the program's own process says about it, see ``driver.py``.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from sod_mcore.rewards.code.answer import final_program
from sod_mcore.rewards.code.cases import Case, Inspection, Outcome, inspect, off_loop
from sod_mcore.rewards.code.unit_tests import CodeTests, read_tests
from sod_mcore.rewards.interface import Verdict
from sod_mcore.tools import ProgramRunner

Scoring = Literal["share", "all"]

_CASES_IN_FLIGHT = 16


class CodeVerifier:
    """Runs every test in an interpreter of its own.

    How many run at a time, over all programs, and what each may use is the runner's business.
    """

    def __init__(self, runner: ProgramRunner, scoring: Scoring = "share") -> None:
        """Remember how to run and score.

        Args:
            runner: started and closed by its owner.
            scoring: "share" runs all tests and gives the share that passed; "all" asks only
                whether all pass, and stops at the first that does not.
        """
        if scoring not in get_args(Scoring):
            raise ValueError(
                f"CodeVerifier: scoring = {scoring!r}: give one of {', '.join(get_args(Scoring))}"
            )
        self._runner = runner
        self._scoring = scoring

    async def verify(
        self, response_text: str, ground_truth: str, extra_info: Mapping[str, object]
    ) -> Verdict:
        """Judge the last fenced block of a response; one that does not compile is "bad_format".

        Args:
            response_text: text of the final assistant turn.
            ground_truth: see ``unit_tests.py``.
            extra_info: not used.

        Raises:
            ValueError: the ground truth is unusable.
            InfrastructureError: the runner is broken. A test that could not run never counts as
                failed.
        """
        problem = await off_loop(len(ground_truth), read_tests, ground_truth)
        program = final_program(response_text)
        if program is None:
            return Verdict("no_answer")
        readings = problem.readings(program)
        inspection = await inspect(self._runner, readings, problem.preamble, problem.test)
        cases = _make_cases(problem, readings, inspection)
        if not cases:
            return Verdict("bad_format", program)
        outcomes = await self._run(cases)
        return self._verdict(program, len(cases), Counter(outcomes))

    async def _run(self, cases: Sequence[Case]) -> list[Outcome]:
        """Outcomes in the order of their ends; with scoring "all", up to the first failure."""
        # The runner bounds what runs; this bounds the texts that wait for it in memory.
        slots = asyncio.Semaphore(_CASES_IN_FLIGHT)

        async def run_one(case: Case) -> Outcome:
            async with slots:
                return await case.run(self._runner)

        tasks = [asyncio.create_task(run_one(case)) for case in cases]
        outcomes: list[Outcome] = []
        try:
            for ended in asyncio.as_completed(tasks):
                outcomes.append(await ended)
                if self._scoring == "all" and outcomes[-1] != "passed":
                    break
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return outcomes

    def _verdict(self, program: str, tests: int, counts: Counter[Outcome]) -> Verdict:
        passed = counts["passed"]
        parts = {
            "tests": float(tests),
            "tests_passed": float(passed),
            "tests_stopped": float(counts["stopped"]),
        }
        share = passed / tests if self._scoring == "share" else None
        return Verdict("right" if passed == tests else "wrong", program, share, parts)


def _make_cases(
    problem: CodeTests, readings: Sequence[Sequence[str]], inspection: Inspection
) -> Sequence[Case]:
    """The tests; none where no reading of the program compiles."""
    if inspection.reading is None:
        return []
    return problem.cases(readings[inspection.reading], inspection)
