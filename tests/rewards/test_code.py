"""The code verifier: verdicts of right and wrong programs, in the sandbox and with a fake one."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from sod_mcore.rewards.code import CodeVerifier
from sod_mcore.rewards.interface import Verdict
from sod_mcore.tools import InfrastructureError, Sandbox, SandboxLimits, SandboxResult
from tests.rewards.code_helpers import FakeRunner, fenced, finished

SUM = {"inputs": ["1 2\n", "3 4\n", "5 6\n", "7 8\n"], "outputs": ["3\n", "7", "11", "15"]}
READ_AND_ADD = "print(sum(map(int, input().split())))"


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    limits = SandboxLimits(wall_seconds=20.0, cpu_seconds=1)
    async with asyncio.timeout(240), Sandbox(limits, max_concurrency=4) as sandbox:
        yield sandbox


async def verdict(
    sandbox: Sandbox, program: str, row: object, verifier: CodeVerifier | None = None
) -> Verdict:
    """The verdict on a program by the tests of a row."""
    verifier = verifier or CodeVerifier(sandbox)
    return await verifier.verify(fenced(program), json.dumps(row), {})


@pytest.mark.asyncio
class TestStdin:
    async def test_right(self, sandbox: Sandbox) -> None:
        right = await verdict(sandbox, READ_AND_ADD, SUM)
        assert right == Verdict(
            "right",
            READ_AND_ADD + "\n",
            1.0,
            {"tests": 4.0, "tests_passed": 4.0, "tests_stopped": 0.0},
        )

    async def test_share(self, sandbox: Sandbox) -> None:
        program = "a, b = map(int, input().split())\nprint(a + b if a < 6 else 0)"
        wrong = await verdict(sandbox, program, SUM)
        assert (wrong.category, wrong.share) == ("wrong", 0.75)
        wrong = await verdict(sandbox, "print('no')", SUM)
        assert (wrong.category, wrong.share) == ("wrong", 0.0)

    async def test_exit_code(self, sandbox: Sandbox) -> None:
        late = READ_AND_ADD + "\nimport sys\nsys.exit(1)"
        assert (await verdict(sandbox, late, SUM)).share == 0.0
        assert (await verdict(sandbox, late.replace("(1)", "(0)"), SUM)).share == 1.0

    async def test_main_guard_and_all_ways_of_reading(self, sandbox: Sandbox) -> None:
        program = (
            "import os, sys\n"
            "if __name__ == '__main__':\n"
            "    first = sys.stdin.readline(); rest = sys.stdin.read()\n"
            "    print(len(first), len(rest))"
        )
        row = {"inputs": ["12\n345\n"], "outputs": ["3 4"]}
        assert (await verdict(sandbox, program, row)).category == "right"
        row = {"inputs": ["12\n345\n"], "outputs": ["7"]}
        program = "import os\nprint(len(os.read(0, 100)))"
        assert (await verdict(sandbox, program, row)).category == "right"

    async def test_vector_c2(self, sandbox: Sandbox) -> None:
        """The reference turns the literal's two characters into a line break and gives -1."""
        program = r'print("\n".join(str(i) for i in range(int(input()))))'
        row = {"inputs": ["3", "2"], "outputs": ["0\n1\n2\n", "0\n1\n"]}
        assert (await verdict(sandbox, program, row)).share == 1.0

    async def test_timeout(self) -> None:
        async with Sandbox(SandboxLimits(wall_seconds=2.0)) as sandbox:
            program = "if int(input()) > 1:\n    import time\n    time.sleep(60)\nprint(1)"
            row = {"inputs": ["1", "2"], "outputs": ["1", "1"]}
            wrong = await verdict(sandbox, program, row)
        assert (wrong.category, wrong.share, wrong.parts["tests_stopped"]) == ("wrong", 0.5, 1.0)

    @pytest.mark.parametrize(
        "program",
        [
            "print(",
            "def f():\nreturn 1",
            "return 1",
            "x = '\0'",
            "x = '\ud800'",
            "(" * 2000,
            "-" * 500_000 + "1",
            "1" + "+1" * 500_000,
        ],
        ids=lambda program: repr(program[:10]),
    )
    async def test_a_program_that_does_not_compile(self, sandbox: Sandbox, program: str) -> None:
        bad = await verdict(sandbox, program, SUM)
        assert bad == Verdict("bad_format", program + "\n")

    async def test_a_syntax_error_at_run_time_is_a_wrong_answer(self, sandbox: Sandbox) -> None:
        wrong = await verdict(sandbox, "compile('(', '', 'exec')", SUM)
        assert (wrong.category, wrong.share) == ("wrong", 0.0)


TWO_SUM = {
    "inputs": ["[3, 3]\n6", "[1, 2, 3]\n5"],
    "outputs": ["[0, 1]", "[1, 2]"],
    "fn_name": "twoSum",
}
TWO_SUM_METHOD = """
class Solution:
    def twoSum(self, nums: List[int], target: int) -> List[int]:
        print("so many", nums)
        pairs = itertools.combinations(range(len(nums)), 2)
        return next((i, j) for i, j in pairs if nums[i] + nums[j] == target)
"""


@pytest.mark.asyncio
class TestCalls:
    async def test_method_of_solution_without_imports(self, sandbox: Sandbox) -> None:
        """A tuple counts as the list that JSON has; what it prints does not count."""
        assert (await verdict(sandbox, TWO_SUM_METHOD, TWO_SUM)).share == 1.0

    async def test_function(self, sandbox: Sandbox) -> None:
        program = "def twoSum(nums, target):\n    return [0, 1]\nif __name__ == '__main__':\n    x"
        assert (await verdict(sandbox, program, TWO_SUM)).share == 0.5

    async def test_argument_lists(self, sandbox: Sandbox) -> None:
        row = {"inputs": [[2, 3], [0.1, 0.2]], "outputs": [[5], [0.3]], "fn_name": "add"}
        assert (await verdict(sandbox, "def add(a, b): return a + b", row)).share == 1.0

    async def test_asserts(self, sandbox: Sandbox) -> None:
        row = {
            "inputs": ["", ""],
            "outputs": [None, None],
            "assert_case": [
                "assert [half(n) for n in (2, 4)] == [1, 2]\nassert half(6) == 3",
                "try:\n    half(3)\nexcept ValueError: pass\nelse:\n    assert False",
            ],
        }
        program = "def half(n):\n    if n % 2: raise ValueError(n)\n    return n // 2"
        assert (await verdict(sandbox, program, row)).share == 1.0
        program = "def half(n):\n    return n // 2"
        assert (await verdict(sandbox, program, row)).share == 0.5

    @pytest.mark.parametrize(
        "program",
        [
            "def f(n): return [n]",
            "def f(n): return {n}",
            "def f(n): return object()",
            "def g(n): return n",
            "def f(n): raise ValueError",
            "def f(n): return n\nraise ValueError",
            "def f(): return 1",
        ],
    )
    async def test_wrong(self, sandbox: Sandbox, program: str) -> None:
        row = {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}
        wrong = await verdict(sandbox, program, row)
        assert (wrong.category, wrong.share) == ("wrong", 0.0)

    async def test_cpu_limit(self, sandbox: Sandbox) -> None:
        row = {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}
        wrong = await verdict(sandbox, "def f(n):\n    while True: pass", row)
        assert (wrong.category, wrong.parts["tests_stopped"]) == ("wrong", 1.0)


REVERSE = {
    "entry_point": "Solution().reverseList",
    "import_prefix": """
from typing import Optional
class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next
def list_node(values):
    head = None
    for value in reversed(values): head = ListNode(value, head)
    return head
def is_same_list(a, b):
    while a and b:
        if a.val != b.val: return False
        a, b = a.next, b.next
    return a is b
""",
    "test_code": """
def check(candidate):
    many = list(range(3000))
    assert is_same_list(candidate(head = list_node([1, 2, 3])), list_node([3, 2, 1]))
    assert is_same_list(candidate(head = list_node([])),
                        list_node([]))
    assert is_same_list(candidate(head = list_node(many)), list_node(many[::-1]))
    for n in range(3):
        assert candidate(head = list_node([n])).val == n
""",
}
REVERSE_METHOD = """
class Solution:
    def reverseList(self, head: Optional[ListNode]) -> Optional[ListNode]:
        last = None
        while head:
            head.next, last, head = last, head, head.next
        return last
"""


@pytest.mark.asyncio
class TestLeetCode:
    async def test_nodes_go_in_and_come_out(self, sandbox: Sandbox) -> None:
        right = await verdict(sandbox, REVERSE_METHOD, REVERSE)
        assert (right.category, right.parts["tests"]) == ("right", 4.0)

    async def test_the_program_defines_the_node_again(self, sandbox: Sandbox) -> None:
        node = "class ListNode:\n    def __init__(self, val, next): ...\n"
        assert (await verdict(sandbox, node + REVERSE_METHOD, REVERSE)).share == 1.0

    async def test_share(self, sandbox: Sandbox) -> None:
        program = "class Solution:\n    def reverseList(self, head): return head"
        assert (await verdict(sandbox, program, REVERSE)).share == 0.5

    async def test_bad_tests_are_refused(self, sandbox: Sandbox) -> None:
        for test in ("def check(candidate):\nassert", "def test(candidate): pass"):
            with pytest.raises(ValueError, match="'test_code'"):
                await verdict(sandbox, REVERSE_METHOD, {**REVERSE, "test_code": test})


@pytest.mark.asyncio
class TestVerdicts:
    async def test_no_answer_needs_no_run(self) -> None:
        runner = FakeRunner(lambda stdin: finished())
        assert await CodeVerifier(runner).verify("42", json.dumps(SUM), {}) == Verdict("no_answer")
        assert runner.inputs == []

    async def test_a_bad_row_is_refused_whatever_the_answer(self) -> None:
        runner = FakeRunner(lambda stdin: finished())
        for answer in ("42", fenced("x")):
            with pytest.raises(ValueError, match="ground_truth"):
                await CodeVerifier(runner).verify(answer, "{}", {})

    async def test_a_broken_sandbox_is_no_failed_test(self) -> None:
        def break_at_the_third(stdin: str) -> SandboxResult:
            if stdin == SUM["inputs"][2]:
                raise InfrastructureError("gone")
            return finished("wrong")

        runner = FakeRunner(break_at_the_third)
        with pytest.raises(InfrastructureError, match="gone"):
            await CodeVerifier(runner).verify(fenced("x"), json.dumps(SUM), {})

    async def test_a_sandbox_without_a_working_python_is_broken(self) -> None:
        class Broken(FakeRunner):
            async def run(self, code: str, **options: object) -> SandboxResult:
                return SandboxResult("", "ImportError: no json", 1, "finished", 0.1)

        with pytest.raises(InfrastructureError, match="ImportError: no json"):
            await CodeVerifier(Broken(lambda _: finished())).verify(
                fenced("x"), json.dumps(SUM), {}
            )

    async def test_all_stops_at_the_first_failure(self) -> None:
        row = {"inputs": [str(i) for i in range(1000)], "outputs": [str(i) for i in range(1000)]}
        runner = FakeRunner(lambda stdin: finished(stdin if stdin != "40" else "x"), 0.001)
        wrong = await CodeVerifier(runner, "all").verify(fenced("x"), json.dumps(row), {})
        assert (wrong.category, wrong.share) == ("wrong", None)
        assert 40 < len(runner.inputs) < 100
        assert wrong.parts["tests"] == 1000.0
        shared = await CodeVerifier(runner, "share").verify(fenced("x"), json.dumps(row), {})
        assert shared.share == 0.999

    async def test_all_without_a_failure(self) -> None:
        runner = FakeRunner(finished)
        row = {"inputs": ["1", "2"], "outputs": ["1", "2"]}
        right = await CodeVerifier(runner, "all").verify(fenced("x"), json.dumps(row), {})
        assert (right.category, right.share) == ("right", None)

    async def test_unknown_scoring_is_refused(self) -> None:
        with pytest.raises(ValueError, match="scoring = 'some': give one of share, all"):
            CodeVerifier(FakeRunner(finished), "some")  # type: ignore[arg-type]

    async def test_a_sandbox_that_allows_one_process_only_is_refused(self) -> None:
        """A function under test needs two; a whole program needs one."""
        async with Sandbox(SandboxLimits(wall_seconds=20.0, processes=1)) as sandbox:
            assert (await verdict(sandbox, READ_AND_ADD, SUM)).share == 1.0
            with pytest.raises(InfrastructureError, match="cannot keep a test from its program"):
                await verdict(sandbox, TWO_SUM_METHOD, TWO_SUM)
