r"""Answers written to hang, crash or subvert a grader: none may, in the pool that runs it."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sod_mcore.rewards import GraderPool, find_grader

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT_SECONDS = 4.0
GRADERS = ("math_verify", "strict_box", "minerva", "choice")
HOSTILE = {
    "ten megabytes of words": "so " * (10 << 20),
    "ten megabytes in a box": "\\boxed{" + "1" * (10 << 20) + "}",
    "a million open boxes": "\\boxed{" * (1 << 20),
    "a million braces": "\\boxed{" + "{" * (1 << 20) + "1" + "}" * (1 << 20) + "}",
    "nested braces": "\\boxed{" + "{" * 400 + "1" + "}" * 400 + "}",
    "nested fractions": "\\boxed{" + "\\frac{1}{" * 80 + "2" + "}" * 80 + "}",
    "nested parentheses": "\\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
    "a tower of powers": "\\boxed{9^{9^{9^9}}}",
    "another tower": "Answer: 9**9**9**9 \\boxed{9**9**9**9}",
    "a factorial": "\\boxed{(10^{10})!}",
    "a sum": "\\boxed{\\sum_{n=1}^{10^{10}} \\frac{1}{n^{1/2}}}",
    "a large exponent": "\\boxed{1e999999999999}",
    "many digits": "\\boxed{" + "7" * 999 + "}",
    "one box of many": "\\boxed " * (1 << 20) + "{",
    "spaces behind a box": "\\boxed" + " " * (1 << 20),
    "many thoughts": "<think>" * (1 << 20) + "</think>" * (1 << 20),
    "many units": "\\boxed{13 " + "kilometers per " * 66 + "}",
    "many words": "\\boxed{12 " + "million " * 120 + "}",
    "many wrappers": "\\boxed{12" + "\\text{m " * 60 + "}" * 61,
    "many labels": "\\boxed{" + "the answer is option " * 45 + "}",
    "quotes around quotes": "\\boxed{" + "'" * 500 + "\"" * 500 + "}",
    "NUL": "\\boxed{1\x00} \x00",
    "surrogates": "\\boxed{\ud800\udfff} \udc00",
    "other digits": "\\boxed{٣} \\boxed{²}",
    "right to left": "\\boxed{\u202e21}",
    "a format": "\\boxed{%s%n{0}{}}",
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[GraderPool]:
    """Two processes, the same for all answers."""
    async with GraderPool(workers=2, timeout_seconds=LIMIT_SECONDS) as pool:
        for name in GRADERS:  # what they import takes its time the first time
            await pool.grade(find_grader(name), "\\boxed{x + 1}", "A", {})
        yield pool


@pytest.mark.parametrize("kind", HOSTILE)
async def test_no_answer_hangs_or_breaks_the_pool(pool: GraderPool, kind: str) -> None:
    began = time.monotonic()
    for name in GRADERS:
        truth = "A" if name == "choice" else "12"
        verdict = await pool.grade(find_grader(name), HOSTILE[kind], truth, {})
        assert verdict.category != "right", name
    assert time.monotonic() - began < len(GRADERS) * (6 * LIMIT_SECONDS + 10)
    good = await pool.grade(find_grader("math_verify"), "\\boxed{12}", "12", {})
    assert good.category == "right"


@pytest.mark.parametrize("name", GRADERS)
async def test_no_code_is_run(pool: GraderPool, name: str, tmp_path: Path) -> None:
    target = tmp_path / "written"
    attacks = [
        f"__import__('os').system('touch {target}')",
        f"'{{}}'.format(open('{target}', 'w').close())",
        f"1 + open('{target}', 'w').close()",
        f"\\text{{__import__('pathlib').Path('{target}').touch()}}",
        f"\\input{{|touch {target}}}",
    ]
    for attack in attacks:
        text = f"Answer: {attack}\n\\boxed{{{attack}}} Answer: {attack}"
        await pool.grade(find_grader(name), text, "A", {})
    assert not target.exists()


async def test_hostile_answers_among_good_ones(pool: GraderPool) -> None:
    """Good answers are graded right while towers of powers are being killed."""
    grader = find_grader("math_verify")
    texts = ["\\boxed{9^{9^{9^9}}}"] + ["\\boxed{12}"] * 40
    verdicts = await asyncio.gather(*(pool.grade(grader, text, "12", {}) for text in texts))
    assert verdicts[0].category != "right"
    assert {verdict.category for verdict in verdicts[1:]} == {"right"}
