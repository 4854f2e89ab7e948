"""What a function under test finds around it, and how it is found."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from sod_mcore.rewards.code import CodeVerifier
from sod_mcore.tools import Sandbox, SandboxLimits
from tests.rewards.code_helpers import fenced


@pytest_asyncio.fixture
async def verifier() -> AsyncIterator[CodeVerifier]:
    limits = SandboxLimits(wall_seconds=20.0)
    async with asyncio.timeout(240), Sandbox(limits, max_concurrency=4) as sandbox:
        yield CodeVerifier(sandbox)


async def share(
    verifier: CodeVerifier, program: str, function: str, *calls: tuple[Sequence[object], object]
) -> float | None:
    """The share of calls that return what they should."""
    row = {
        "inputs": ["\n".join(map(json.dumps, arguments)) for arguments, _ in calls],
        "outputs": [json.dumps(value) for _, value in calls],
        "fn_name": function,
    }
    return (await verifier.verify(fenced(program), json.dumps(row), {})).share


@pytest.mark.asyncio
class TestPrelude:
    async def test_a_power_with_a_modulus(self, verifier: CodeVerifier) -> None:
        program = "def f(n, p): return [pow(2, n, 1000000007), pow(n, -1, p)]"
        calls = (([10, 7], [1024, 5]), ([1000, 11], [pow(2, 1000, 1000000007), 10]))
        assert await share(verifier, program, "f", *calls) == 1.0

    async def test_built_ins_are_themselves(self, verifier: CodeVerifier) -> None:
        program = (
            "def f(names):\n"
            "    return [name for name in names if globals().get(name) is not getattr(\n"
            "        __import__('builtins'), name)]"
        )
        names = ["sum", "min", "max", "abs", "pow", "round", "open", "compile", "all", "exit"]
        assert await share(verifier, program, "f", ([names], [])) == 1.0

    async def test_names_that_livecodebench_gives(self, verifier: CodeVerifier) -> None:
        program = (
            "def f(x: List[int]) -> Optional[int]:\n"
            "    Counter, heappush, bisect_left, inf, lru_cache, reduce, maxsize, StringIO\n"
            "    modules = [itertools, collections, math, datetime, bisect, copy, random, json]\n"
            "    return [type(module).__name__ for module in modules].count('module')"
        )
        assert await share(verifier, program, "f", ([[1]], 8)) == 1.0

    @pytest.mark.parametrize("end", ["exit()", "quit()", "exit(0)", "import sys; sys.exit()"])
    async def test_a_program_that_ends_itself(self, verifier: CodeVerifier, end: str) -> None:
        program = f"def f(n): return n + 1\n{end}\nraise ValueError"
        assert await share(verifier, program, "f", ([1], 2)) == 1.0

    @pytest.mark.parametrize("end", ["exit(1)", "exit('no')"])
    async def test_a_program_that_gives_up(self, verifier: CodeVerifier, end: str) -> None:
        program = f"def f(n): return n + 1\n{end}"
        assert await share(verifier, program, "f", ([1], 2)) == 0.0

    async def test_annotations_are_values(self, verifier: CodeVerifier) -> None:
        program = "def f(n: int): return f.__annotations__['n'] is int"
        assert await share(verifier, program, "f", ([1], True)) == 1.0


NAMES: dict[str, tuple[list[object], object]] = {
    "merge": ([[1, 3], [2]], [1, 2, 3]),
    "search": ([[4, 5], [5]], [4, 5, 5]),
    "compress": ([[1, 1], []], [1, 1]),
    "count": ([[1], [1]], [1, 1]),
    "add": ([[1], [2]], [1, 2]),
    "gcd": ([[8], [6]], [6, 8]),
    "sorted": ([[2], [1]], [1, 2]),
}


@pytest.mark.asyncio
class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    async def test_a_method_that_a_library_has_too(self, verifier: CodeVerifier, name: str) -> None:
        call = NAMES[name]
        body = "both = a + b; both.sort(); return both"
        method = f"class Solution:\n    def {name}(self, a, b):\n        {body}"
        assert await share(verifier, method, name, call) == 1.0
        assert await share(verifier, f"def {name}(a, b):\n    {body}", name, call) == 1.0

    @pytest.mark.parametrize(
        ("name", "arguments", "value"),
        [
            ("gcd", [8, 6], 2),
            ("add", [2, 3], 5),
            ("comb", [5, 2], 10),
            ("factorial", [4], 24),
            ("mean", [[1, 3]], 2),
            ("pow", [2, 3], 8),
            ("sorted", [[2, 1]], [1, 2]),
        ],
    )
    async def test_a_library_answers_nothing(
        self, verifier: CodeVerifier, name: str, arguments: list[object], value: object
    ) -> None:
        other = "class Solution:\n    def other(self): return 1"
        for program in ("pass", other):
            assert await share(verifier, program, name, (arguments, value)) == 0.0

    async def test_the_method_comes_before_a_function(self, verifier: CodeVerifier) -> None:
        program = (
            "def merge(a, b): return 'helper'\n"
            "class Solution:\n    def merge(self, a): return merge(a, a)[:3]"
        )
        assert await share(verifier, program, "merge", ([1], "hel")) == 1.0

    async def test_a_solution_without_the_method(self, verifier: CodeVerifier) -> None:
        program = "class Solution: pass\ndef merge(a): return a"
        assert await share(verifier, program, "merge", ([1], 1)) == 1.0

    async def test_a_method_made_by_the_constructor(self, verifier: CodeVerifier) -> None:
        program = "class Solution:\n    def __init__(self): self.merge = lambda a: a"
        assert await share(verifier, program, "merge", ([1], 1)) == 1.0

    async def test_the_tests_own_helpers_answer_nothing(self, verifier: CodeVerifier) -> None:
        row = {
            "entry_point": "f",
            "import_prefix": "def f(n): return n",
            "test_code": "def check(candidate):\n    assert candidate(1) == 1",
        }
        for program, wanted in (("pass", 0.0), ("def f(n): return 1", 1.0)):
            verdict = await verifier.verify(fenced(program), json.dumps(row), {})
            assert verdict.share == wanted

    async def test_a_built_in_answers_no_assert(self, verifier: CodeVerifier) -> None:
        row = {
            "inputs": [""],
            "outputs": [None],
            "fn_name": "sum",
            "assert_case": ["assert sum([1, 2]) == 3"],
        }
        for program, wanted in (("pass", 0.0), ("def sum(n): return 3", 1.0)):
            verdict = await verifier.verify(fenced(program), json.dumps(row), {})
            assert verdict.share == wanted
