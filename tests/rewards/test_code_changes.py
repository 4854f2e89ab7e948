"""What a function under test changes in its arguments, the test sees; and nothing else."""

import asyncio
import json
import textwrap
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from sod_mcore.rewards.code import CodeVerifier
from sod_mcore.tools import Sandbox, SandboxLimits
from tests.rewards.code_helpers import fenced

PREFIX = """
from collections import Counter, OrderedDict, defaultdict, namedtuple
class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next
Point = namedtuple("Point", "x y")
SECRET = [1, 2]
HOLDER = {"secret": SECRET}
"""


@pytest_asyncio.fixture
async def verifier() -> AsyncIterator[CodeVerifier]:
    limits = SandboxLimits(wall_seconds=20.0)
    async with asyncio.timeout(240), Sandbox(limits, max_concurrency=4) as sandbox:
        yield CodeVerifier(sandbox)


async def share(verifier: CodeVerifier, program: str, check: str) -> float | None:
    """The share that a program gets from the lines of a check, all of them one test."""
    lines = textwrap.indent(textwrap.dedent(check), "        ")
    row = {
        "entry_point": "f",
        "import_prefix": PREFIX,
        "test_code": f"def check(candidate):\n    if True:\n{lines}",
    }
    verdict = await verifier.verify(fenced(textwrap.dedent(program)), json.dumps(row), {})
    return verdict.share


SEEN = {
    "a sorted list": (
        "def f(nums): nums.sort()",
        "nums = [2, 0, 1]\nassert candidate(nums) is None\nassert nums == [0, 1, 2]",
    ),
    "a slice": (
        "def f(nums, k): nums[:] = nums[-k:] + nums[:-k]",
        "nums = [1, 2, 3]\nsame = nums\ncandidate(nums=nums, k=1)\n"
        "assert nums == [3, 1, 2] and same is nums",
    ),
    "a matrix": (
        "def f(rows):\n    for row in rows: row[0] = 0\n    rows.append(rows[0])",
        "rows = [[1, 2], [3, 4]]\nfirst = rows[0]\ncandidate(rows)\n"
        "assert rows == [[0, 2], [0, 4], [0, 2]]\nassert rows[0] is first is rows[2]",
    ),
    "a dict and a set": (
        "def f(d, s):\n    d['b'] = d.pop('a') + 1\n    s.discard(1); s.add((7, 8))",
        "d, s = {'a': 1}, {1, 2}\ncandidate(d, s)\nassert d == {'b': 2} and s == {2, (7, 8)}",
    ),
    "dicts of other kinds": (
        "def f(c, d, o):\n    c['a'] += 1\n    d['x'] = [1]\n    o['z'] = o.pop('y')",
        "c, d, o = Counter('a'), defaultdict(list), OrderedDict(y=1, w=2)\ncandidate(c, d, o)\n"
        "assert c == Counter('aa') and type(c) is Counter\n"
        "assert d == {'x': [1]} and d['n'] == []\n"
        "assert list(o.items()) == [('w', 2), ('z', 1)]",
    ),
    "nodes that are linked anew": (
        "def f(head):\n    second = head.next\n    head.next, second.next = None, head\n"
        "    second.value += 10\n    return second",
        "a, b = Node(1), Node(2)\na.next = b\nresult = candidate(a)\n"
        "assert result is b and b.next is a and a.next is None and b.value == 12",
    ),
    "an argument that comes back": (
        "def f(a, b): return b",
        "a, b = [1], [1]\nassert candidate(a, b) is b",
    ),
    "a new node of the program's": (
        "def f(head): head.next = Node(5)",
        "head = Node(1)\ncandidate(head)\nassert type(head.next) is Node\n"
        "assert head.next.value == 5",
    ),
    "a list within a tuple": (
        "def f(pair): pair[1].append(pair)",
        "pair = (1, [])\ncandidate(pair)\nassert pair[1][0] is pair",
    ),
    "what is not changed stays what it was": (
        "def f(points, other): other.append(points[0])",
        "points, other = [Point(1, 2)], [Point(3, 4)]\nfirst = points[0]\n"
        "candidate(points, other)\nassert points[0] is first is other[1]\nassert other[0].x == 3",
    ),
    "two calls": (
        "def f(nums): nums.append(len(nums)); return nums",
        "nums = []\nassert candidate(nums) == [0]\nassert candidate(nums) == [0, 1]",
    ),
    "a result beside something that cannot come back": (
        "def f(nums, d): d['q'] = iter(nums); nums.sort(); return 3",
        "nums = [2, 1]\nassert candidate(nums, {}) == 3\nassert nums == [2, 1]",
    ),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", SEEN)
async def test_changes_are_seen(verifier: CodeVerifier, name: str) -> None:
    program, check = SEEN[name]
    assert await share(verifier, program, check) == 1.0


@pytest.mark.asyncio
async def test_what_is_left_unchanged_is_seen_too(verifier: CodeVerifier) -> None:
    for program in ("def f(nums): return sorted(nums)", "def f(nums): nums = sorted(nums)"):
        check = "nums = [2, 0, 1]\ncandidate(nums)\nassert nums == [0, 1, 2]"
        assert await share(verifier, program, check) == 0.0


@pytest.mark.asyncio
async def test_statements_see_changes(verifier: CodeVerifier) -> None:
    row = {
        "inputs": [""],
        "outputs": [None],
        "assert_case": ["nums = [2, 1]\nsort(nums)\nassert nums == [1, 2]"],
    }
    verdict = await verifier.verify(fenced("def sort(n): n.sort()"), json.dumps(row), {})
    assert verdict.share == 1.0


FORGERS = {
    "builtins and modules of its own": """
        import builtins, gc, sys
        for module in list(sys.modules.values()):
            if hasattr(module, "SECRET"): module.SECRET[:] = [9]
        SECRET[:] = [9]
        HOLDER.clear()
        def f(nums):
            for item in gc.get_objects():
                if item == [1, 2]: item.append(3)
            nums[:] = [9]
    """,
    "a list that becomes a dict": 'def f(nums): reply(3, *CALL, ["dict", []])',
    "a list that becomes another thing": 'def f(nums): reply(3, *CALL, ["Counter", []])',
    "attributes of a list": 'def f(nums): reply(3, *CALL, ["Node", [["__class__", 1]]])',
    "the lists of the call itself": """
        def f(nums):
            reply(0, ["list", [9]], ["tuple", [[4]]], ["dict", [["a", 9]]], ["list", [[0]]])
    """,
    "more rows": 'def f(nums): reply(5, *CALL, None, ["list", [9]], ["list", [[3]]])',
    "places that are none": 'def f(nums): reply(-9, *CALL, ["list", [[99]]])',
    "fewer rows": 'def f(nums): reply(0, ["list", [9]])',
    "no rows": "def f(nums): reply(0)",
    "rows that are none": 'def f(nums): reply(0, 5, "list", {}, [])',
    "a class that the test imports": """
        def f(nums): reply(4, *CALL, None, ["list", [[5]]], ["defaultdict", []])
    """,
}
REPLY = """
import json, os
CALL = [None, None, None]  # rows of the judge's own: the list of both, its tuple and its dict
def reply(place, *rows):
    message = {"value": {"changes": True, "table": [*rows, ["list", [[place]]]]}}
    for descriptor in range(3, 64):
        try: os.write(descriptor, (json.dumps(message) + "\\n").encode())
        except OSError: pass
"""


@pytest.mark.asyncio
@pytest.mark.parametrize("name", FORGERS)
async def test_nothing_else_is_changed(verifier: CodeVerifier, name: str) -> None:
    """Whatever the call does to its argument or raises, the test's other objects are its own."""
    program = REPLY + textwrap.dedent(FORGERS[name])
    check = """
        nums, other = [1, 2], [1, 2]
        expected, holder = [3, 4], {"a": other}
        try:
            candidate(nums)
        except Exception:
            pass
        assert other == SECRET == [1, 2] and HOLDER["secret"] is SECRET
        assert expected == [3, 4] and holder["a"] is other
        assert type(nums) is list and Node(1).value == 1 and candidate.__class__ is not list
    """
    assert await share(verifier, program, check) == 1.0
    assert await share(verifier, program, check + "\n        assert nums == [3, 4]") == 0.0


@pytest.mark.asyncio
async def test_a_forged_reply_is_read(verifier: CodeVerifier) -> None:
    """Else the test above would show nothing."""
    program = REPLY + 'def f(nums): reply(3, *CALL, ["list", [9]])'
    check = "nums = [1, 2]\nassert candidate(nums) is nums\nassert nums == [9]"
    assert await share(verifier, program, check) == 1.0
