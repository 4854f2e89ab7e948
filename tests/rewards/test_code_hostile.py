"""Programs that try to be judged right without solving anything. None may be, in any form of test.

Each of them is the answer to four problems; that the honest program passes them all shows that the
tests can be passed.
"""

import asyncio
import json
import textwrap
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from sod_mcore.rewards.code import CodeVerifier
from sod_mcore.tools import Sandbox, SandboxLimits
from tests.rewards.code_helpers import fenced

EXPECTED = 618033  # of triple(206011); also what a thief would look for
CHECK = (
    "def check(candidate):\n    assert candidate(206011) == 618033\n    assert candidate(2) == 6\n"
)
PROBLEMS: dict[str, dict[str, object]] = {
    "stdin": {"inputs": ["206011", "2"], "outputs": ["618033", "6"]},
    "call": {"inputs": ["206011", "2"], "outputs": ["618033", "6"], "fn_name": "triple"},
    "leetcode": {"entry_point": "triple", "import_prefix": "import math", "test_code": CHECK},
    "human_eval": {"entry_point": "triple", "prompt": "def triple(n):\n    ''", "test": CHECK},
    "asserts": {
        "inputs": [""],
        "outputs": [None],
        "assert_case": ["assert triple(206011) == 618033\nassert triple(2) == 6"],
    },
}
HONEST = """
def triple(n):
    return 3 * n
if __name__ == "__main__":
    print(triple(int(input())))
"""

ATTEMPTS = {
    "exit while loading": """
        import os
        os._exit(0)
    """,
    "exit in the call": """
        import os
        def triple(n): os._exit(0)
    """,
    "SystemExit in the call": """
        def triple(n): raise SystemExit(0)
    """,
    "KeyboardInterrupt in the call": """
        def triple(n): raise KeyboardInterrupt
    """,
    "StopIteration in the call": """
        def triple(n): raise StopIteration
    """,
    "an object that equals everything": """
        class Equal:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
        def triple(n): return Equal()
        print(Equal())
    """,
    "a number that equals everything": """
        class Equal(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
            def __int__(self): return self
            __index__ = __trunc__ = __int__
        def triple(n): return Equal(1)
    """,
    "an object of a class that claims to be another": """
        class int(int):
            __class__ = property(lambda self: __builtins__["int"])
            def __eq__(self, other): return True
        int.__module__ = "builtins"
        def triple(n): return int(1)
    """,
    "other built-ins": """
        import builtins
        class Quiet(Exception): pass
        builtins.AssertionError = Quiet
        builtins.int = builtins.isinstance = builtins.type = lambda *rest: True
        def triple(n): return True
    """,
    "another check": """
        def check(candidate): return None
        def triple(n): return 1
        import sys
        sys.modules["__main__"].check = check
    """,
    "another json": """
        import json
        json.dumps = lambda *rest, **options: '{"passed": true, "value": true}'
        json.loads = lambda text: {"passed": True, "arguments": [["list", []]]}
        def triple(n): return 1
    """,
    "reports on every descriptor": """
        import os
        report = b'{"passed": true, "value": [["scalar", true]]}\\n'
        for descriptor in range(64):
            try: os.write(descriptor, report * 50)
            except OSError: pass
        def triple(n): return 1
    """,
    "the judge killed and stopped": """
        import os
        def triple(n):
            for number in (15, 2, 1, 14, 10, 9):
                try: os.kill(os.getppid(), number)
                except OSError: pass
    """,
    "other functions in every frame": """
        import sys
        frame = sys._getframe()
        while frame:
            for name in list(frame.f_globals):
                if name.strip("_") in ("answer", "attempt", "call_candidate", "json", "pack"):
                    frame.f_globals[name] = lambda *rest: {"passed": True}
            frame = frame.f_back
        def triple(n): return 1
    """,
}

THIEF = """
import ctypes, gc, os, sys
def triple(n):
    found = []
    for item in gc.get_objects():
        for inner in (item.values() if type(item) is dict else [item]):
            if isinstance(inner, (str, bytes)) and len(inner) < 100_000:
                found.append(inner if isinstance(inner, str) else inner.decode("latin1"))
    frame = sys._getframe()
    while frame:
        found += [repr(frame.f_locals), repr(frame.f_code.co_consts)]
        frame = frame.f_back
    for name in ("stdin", "code", "/proc/self/maps", f"/proc/{os.getppid()}/mem",
                 f"/proc/{os.getppid()}/fd/0", f"/proc/{os.getppid()}/environ"):
        try: found.append(open(name, "rb").read().decode("latin1"))
        except OSError: pass
    for descriptor in range(3, 64):
        try:
            os.lseek(descriptor, 0, 0)
            found.append(os.read(descriptor, 100_000).decode("latin1"))
        except OSError: pass
    text = "".join(found)
    secret = "".join(map(chr, (54, 49, 56, 48, 51, 51)))  # not to be found in this source
    return 3 * n if secret in text else -1
"""


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    limits = SandboxLimits(wall_seconds=20.0)
    async with asyncio.timeout(240), Sandbox(limits, max_concurrency=4) as sandbox:
        yield sandbox


@pytest.fixture
def verifier(sandbox: Sandbox) -> CodeVerifier:
    return CodeVerifier(sandbox)


async def shares(verifier: CodeVerifier, program: str) -> dict[str, float | None]:
    """The share of passed tests by problem."""
    verdicts = await asyncio.gather(
        *(verifier.verify(fenced(program), json.dumps(row), {}) for row in PROBLEMS.values())
    )
    return dict(zip(PROBLEMS, (verdict.share for verdict in verdicts), strict=True))


@pytest.mark.asyncio
async def test_the_honest_program_passes(verifier: CodeVerifier) -> None:
    assert await shares(verifier, HONEST) == dict.fromkeys(PROBLEMS, 1.0)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ATTEMPTS)
async def test_attempts_pass_nothing(verifier: CodeVerifier, name: str) -> None:
    program = textwrap.dedent(ATTEMPTS[name])
    assert await shares(verifier, program) == dict.fromkeys(PROBLEMS, 0.0)


@pytest.mark.asyncio
async def test_attempts_are_not_harmless(sandbox: Sandbox) -> None:
    """A judge in the program's own interpreter that goes by the exit code, as the reference's."""
    programs = [textwrap.dedent(text) + CHECK + "check(triple)" for text in ATTEMPTS.values()]
    results = await asyncio.gather(*(sandbox.run(program) for program in programs))
    fooled = {
        name for name, result in zip(ATTEMPTS, results, strict=True) if result.return_code == 0
    }
    assert fooled == {
        "exit while loading",
        "exit in the call",
        "SystemExit in the call",
        "an object that equals everything",
        "a number that equals everything",
        "an object of a class that claims to be another",
    }


@pytest.mark.asyncio
async def test_the_expected_values_are_not_to_be_found(verifier: CodeVerifier) -> None:
    found = await shares(verifier, THIEF)
    del found["stdin"]
    assert found == dict.fromkeys(found, 0.0)


@pytest.mark.asyncio
async def test_the_thief_would_know_a_find(verifier: CodeVerifier) -> None:
    found = await shares(verifier, f"loot = 'EXPECTED {EXPECTED}'\n{THIEF}")
    del found["stdin"]
    assert found == dict.fromkeys(found, 1.0)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("program", "share"),
    [
        ("class Node: pass\nNode.__eq__ = lambda *_: True\ndef make(): return Node()", 0.0),
        (
            "class Equal:\n    def __eq__(self, other): return True\n"
            "def make():\n    node = Node()\n    node.value = Equal()\n    return node",
            0.0,
        ),
        ("def same(a, b): return True\ndef make():\n    return Node()", 0.0),
        ("def make():\n    node = Node()\n    node.value = 7\n    return node", 1.0),
    ],
)
async def test_classes_and_helpers_of_the_test_are_the_tests_own(
    verifier: CodeVerifier, program: str, share: float
) -> None:
    row = {
        "entry_point": "make",
        "import_prefix": "class Node:\n    value = 0\ndef same(a, b): return a.value == b",
        "test_code": "def check(candidate):\n    assert same(candidate(), 7)",
    }
    verdict = await verifier.verify(fenced(program), json.dumps(row), {})
    assert verdict.share == share
