"""Runs inside a sandbox: calls functions of a program under test and says what came of it.

It is not imported by the package: ``code_cases.py`` sends its text, behind that of
``code_values.py``, to a sandbox; so only the standard library, and nothing newer than Python 3.10.

A program under test must not be able to forge its verdict. It may replace built-ins, patch modules,
walk the frames above it, or return objects that equal everything. Therefore it runs in a second
process, a fresh interpreter (``serve_program``), and the test in the first (``judge``). Arguments
and results go between them as tables of plain values (``pack``, ``unpack``), so nothing that the
program made runs in the judge. The expected values and the marker, without which no report counts,
are never in the program's process. What is left to it: it could read the judge's memory where it is
privileged (the judge makes itself unreadable to its own user, and the local sandbox has no /proc
and no ptrace).
"""

from __future__ import annotations

import _ast
import builtins
import json
import os
import signal
import sys
import types

TYPE_CHECKING = False  # as in typing, which is not needed here otherwise
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from sod_mcore.rewards.code_values import SOLUTION_MODULE, pack, unpack

SERVE_PROGRAM = "serve-program"
PR_SET_DUMPABLE = 4  # linux/prctl.h


class ProgramEnded(BaseException):
    """The program's process is gone. No test can catch it by ``except Exception``."""


def make_namespace() -> dict[str, Any]:
    """The namespace of a module, which dataclasses look up by its name. It is not __main__: what
    stands behind a main guard is not for tests."""
    module = types.ModuleType(SOLUTION_MODULE)
    sys.modules[SOLUTION_MODULE] = module
    return vars(module)


# The program's process


def serve_program() -> None:
    """Load the program that the first line brings, then answer one line for each line."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)

    def answer(message: dict[str, object]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    setting = json.loads(requests.readline())
    sys.path[:] = setting["path"]
    answer({"ready": True})
    names = make_namespace()
    answer(attempt(load, setting["sources"], names))
    for line in requests:
        answer(attempt(call_candidate, json.loads(line), names))


def load(sources: list[str], names: dict[str, object]) -> None:
    """Run sources one after the other in one namespace."""
    for source in sources:
        exec(compile(source, "<code>", "exec"), names)


def attempt(action: Callable[..., object], *arguments: object) -> dict[str, object]:
    """The reply to one line: a value, or what was raised. Exits are failures too."""
    try:
        return {"value": action(*arguments)}
    except BaseException as error:
        return {"raised": type(error).__name__}


def call_candidate(call: dict[str, Any], names: dict[str, Any]) -> list[Any]:
    """The packed result of the candidate for the packed [positional, named] arguments."""
    positional, named = unpack(call["arguments"], names)
    return pack(find_candidate(call["candidate"], names)(*positional, **named))


def find_candidate(candidate: str, names: dict[str, Any]) -> Any:
    """A function, or else the method of a Solution; or the value of an expression."""
    if not candidate.isidentifier():
        return eval(candidate, names)
    if candidate not in names and "Solution" in names:
        return getattr(names["Solution"](), candidate)
    return names[candidate]


# The judge's process


class Program:
    """The judge's hold of the program's process."""

    def __init__(self, driver: str) -> None:
        """Start a fresh interpreter for it: the memory of a mere fork would hold the tests."""
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        self.has_ended = False
        self.pid = os.fork()
        if self.pid == 0:
            become_program(driver, request_read, reply_write)
        os.close(request_read)
        os.close(reply_write)
        self.requests, self.replies = os.fdopen(request_write, "w"), os.fdopen(reply_read)

    def ask(self, message: dict[str, object]) -> dict[str, Any]:
        """Send a line, return the next reply."""
        try:
            self.requests.write(json.dumps(message) + "\n")
            self.requests.flush()
        except OSError as error:
            raise ProgramEnded from error
        return self.reply()

    def reply(self) -> dict[str, Any]:
        """The next reply."""
        line = self.replies.readline()
        if not line:
            raise ProgramEnded
        reply: dict[str, Any] = json.loads(line)
        return reply

    def kill(self) -> None:
        """End it, if it has not ended."""
        if not self.has_ended:
            os.kill(self.pid, signal.SIGKILL)

    def ending_signal(self) -> int:
        """Wait for its end; the signal that ended it, or 0."""
        status = os.waitpid(self.pid, 0)[1]
        self.has_ended = True
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def become_program(driver: str, requests: int, replies: int) -> None:
    """Replace a fork by a fresh interpreter that serves the program; never returns."""
    try:
        os.dup2(requests, 0)
        os.dup2(replies, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        options = ["-I", "-S", "-B", "-X", "utf8", "-c", driver, SERVE_PROGRAM]
        os.execv(sys.executable, [sys.executable, *options])
    finally:
        os._exit(1)


class Remote:
    """A function of the program: a call is done in the program's process.

    It works on copies: what it changes in its arguments, the test does not see.
    """

    def __init__(self, program: Program, candidate: str, names: Mapping[str, object]) -> None:
        self._program, self._candidate, self._names = program, candidate, names

    def __call__(self, *positional: object, **named: object) -> Any:
        arguments = pack([positional, named])
        reply = self._program.ask({"candidate": self._candidate, "arguments": arguments})
        if "value" in reply:
            return unpack(reply["value"], self._names)
        raise exception_named(reply["raised"])


class RemoteNames(dict[str, object]):
    """A namespace in which every name that it lacks is a function of the program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program

    def __missing__(self, name: str) -> Remote:
        if hasattr(builtins, name):
            raise KeyError(name)
        return Remote(self._program, name, self)


def exception_named(name: str) -> Exception:
    """A built-in exception, for tests that expect one. Those that would end a loop of the test
    quietly are not let through."""
    kind = getattr(builtins, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return RuntimeError(name)
    if issubclass(kind, (StopIteration, StopAsyncIteration, UnicodeError)):
        return RuntimeError(name)
    return kind("raised by the program")


def close_to_others() -> None:
    """Nothing more to read on standard input, and no reading of this process's memory by others
    of its user: a program that could would find the tests there."""
    import ctypes

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


def judge(request: dict[str, Any]) -> dict[str, object]:
    """Do one test: the report."""
    try:
        close_to_others()
        program = Program(request["driver"])
    except (ImportError, OSError) as error:
        return {"infrastructure": f"the sandbox cannot keep a test from its program: {error}"}
    try:
        program.ask({"path": sys.path, "sources": request["sources"]})
    except ProgramEnded:  # before it had run any line of the program's
        return {"infrastructure": "the sandbox could not start a second interpreter"}
    try:
        loaded = program.reply()
        if "raised" in loaded:
            return {"failure": loaded["raised"]}
        return TESTS[request["mode"]](program, request)
    except ProgramEnded:
        return {"failure": "the program ended", "signal": program.ending_signal()}
    # SystemExit too: a test that ends early has not passed.
    except BaseException as error:
        return {"failure": type(error).__name__}
    finally:
        program.kill()


def call_test(program: Program, request: dict[str, Any]) -> dict[str, object]:
    """The value of one call; whether it is right is decided outside."""
    return {"value": Remote(program, request["candidate"], {})(*request["arguments"])}


def check_test(program: Program, request: dict[str, Any]) -> dict[str, object]:
    """``check(candidate)``, with all of its tests or one only."""
    names = make_namespace()
    load([request["preamble"]], names)
    tree = parse(request["test"])
    if request["only"] is not None:
        keep_one_test(find_check(tree), request["only"])
    candidate = Remote(program, request["candidate"], names)
    if request["candidate"].isidentifier():
        names[request["candidate"]] = candidate  # some tests call it by its name
    exec(compile(tree, "<test>", "exec"), names)
    names["check"](candidate)
    return {"passed": True}


def assert_test(program: Program, request: dict[str, Any]) -> dict[str, object]:
    """Statements that name the program's functions themselves."""
    exec(compile(request["test"], "<test>", "exec"), RemoteNames(program))
    return {"passed": True}


TESTS: dict[str, Callable[[Program, dict[str, Any]], dict[str, object]]] = {
    "call": call_test,
    "check": check_test,
    "assert": assert_test,
}


# What can be said before any line of the program runs


def inspect_sources(request: dict[str, Any]) -> dict[str, object]:
    """The first reading of the program that compiles, and the number of the test's asserts."""
    report: dict[str, object] = {"reading": None, "tests": None, "broken": None}
    try:
        compile(request["preamble"], "<preamble>", "exec")
        check = find_check(parse(request["test"]))
        report["tests"] = None if check is None else len(tests_of(check))
    except (SyntaxError, ValueError) as error:
        report["broken"] = str(error)
    readings = enumerate(request["readings"])
    compiling = (index for index, sources in readings if all(map(compiles, sources)))
    report["reading"] = next(compiling, None)
    return report


def compiles(source: str) -> bool:
    """Whether the compiler takes a source, whatever it says to it."""
    try:
        compile(source, "<code>", "exec")
    except Exception:
        return False
    return True


def parse(source: str) -> Any:
    """The syntax tree of a module."""
    return compile(source, "<test>", "exec", _ast.PyCF_ONLY_AST)


def find_check(tree: Any) -> Any:
    """The function ``check`` of a test, or None."""
    functions = [node for node in tree.body if isinstance(node, _ast.FunctionDef)]
    return next((function for function in functions if function.name == "check"), None)


def tests_of(check: Any) -> list[int]:
    """Positions of the statements of ``check`` that assert something; each is one test."""
    return [place for place, node in enumerate(check.body) if has_assert(node)]


def has_assert(node: Any) -> bool:
    """Whether a statement is an assert or holds one."""
    if isinstance(node, _ast.Assert):
        return True
    if isinstance(node, (_ast.FunctionDef, _ast.ClassDef)):
        return False  # a helper of the tests
    blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody", "handlers")]
    return any(has_assert(child) for block in blocks if isinstance(block, list) for child in block)


def keep_one_test(check: Any, index: int) -> None:
    """Drop the other tests; statements that assert nothing are kept for every test."""
    tests = tests_of(check)
    others = set(tests) - {tests[index]}
    check.body = [node for place, node in enumerate(check.body) if place not in others]


def main() -> None:
    """Be the program's process or the judge's."""
    if sys.argv[1:] == [SERVE_PROGRAM]:
        serve_program()
        return
    request = json.loads(sys.stdin.read())
    report = inspect_sources(request) if request["mode"] == "inspect" else judge(request)
    try:
        text = json.dumps(report)
    except (TypeError, ValueError, RecursionError) as error:
        text = json.dumps({"failure": type(error).__name__})
    sys.stdout.write("\n" + request["marker"] + text + "\n")


main()
