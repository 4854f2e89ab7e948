"""Runs inside a sandbox: calls functions of a program under test and says what came of it.

It is not imported by the package: ``cases.py`` sends its text, behind those of
``values.py`` and ``sources.py``, to a sandbox; so only the standard library, and nothing
newer than Python 3.10.

A program under test must not be able to forge its verdict. It may replace built-ins, patch modules,
walk the frames above it, or return objects that equal everything. Therefore it runs in a second
process, a fresh interpreter (``serve_program``), and the test in the first (``judge``). Arguments
and results go between them as tables of plain values (``pack_items``), so nothing that the program
made runs in the judge. What a call changes in its arguments comes back in the same way; no other
object of the test is within the program's reach. The expected values and the marker, without which
no report counts, are never in the program's process. What is left to it: it could read the judge's
memory where it is privileged (the judge makes itself unreadable to its own user, and the local
sandbox has no /proc and no ptrace).
"""

from __future__ import annotations

import _sitebuiltins
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

    from sod_mcore.rewards.code.sources import (
        compile_source,
        find_check,
        inspect_sources,
        keep_one_test,
        parse,
    )
    from sod_mcore.rewards.code.values import SOLUTION_MODULE, pack_items, unpack_items

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
    for name in ("exit", "quit"):  # as site has them, which -S leaves out
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    answer({"ready": True})
    names = make_namespace()
    given: dict[str, object] = {}
    answer(attempt(load_program, setting["sources"], names, given))
    for line in requests:
        answer(attempt(call_candidate, json.loads(line), names, given))


def load_program(sources: list[str], names: dict[str, object], given: dict[str, object]) -> None:
    """Run the last source, the program itself, behind the others; ``given`` gets what those define.

    A program that ends itself well, as by ``exit()`` in its last line, has been loaded.
    """
    load(sources[:-1], names)
    given.update(names)
    try:
        load(sources[-1:], names)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise


def load(sources: list[str], names: dict[str, object]) -> None:
    """Run sources one after the other in one namespace."""
    for source in sources:
        exec(compile_source(source, "<code>"), names)


def attempt(action: Callable[..., object], *arguments: object) -> dict[str, object]:
    """The reply to one line: a value, or what was raised. Exits are failures too."""
    try:
        return {"value": action(*arguments)}
    except BaseException as error:
        return {"raised": type(error).__name__}


def call_candidate(
    call: dict[str, Any], names: dict[str, Any], given: dict[str, object]
) -> dict[str, object]:
    """Call the candidate with the arguments that the table ``call["arguments"]`` holds.

    Returns:
        {"changes", "table"}. Where "changes" is true, the first rows are those of the arguments as
        they are now, None for one that is as it was; false where the caller does not want them, or
        where an argument now holds something that cannot be packed. The row behind them is a list
        of the result.
    """
    sent = call["arguments"]
    items = unpack_items(sent, names)
    positional, named = items[0]
    result = find_candidate(call["candidate"], names, given)(*positional, **named)
    if call["wants_changes"]:
        try:
            table = pack_items([*items, [result]])
        except TypeError:
            return {"changes": False, "table": pack_items([[result]])}
        kept, new = table[: len(sent)], table[len(sent) :]
        changed = [None if row == before else row for row, before in zip(kept, sent, strict=True)]
        return {"changes": True, "table": changed + new}
    return {"changes": False, "table": pack_items([[result]])}


def find_candidate(candidate: str, names: dict[str, Any], given: dict[str, object]) -> Any:
    """A method of the program's Solution, or else its function; or the value of an expression.

    What stood before the program does not count as its own: a library has functions of the same
    names as many problems.
    """
    if not candidate.isidentifier():
        return eval(compile_source(candidate, "<candidate>", "eval"), names)

    def is_own(name: str) -> bool:
        return name in names and not (name in given and names[name] is given[name])

    if is_own("Solution") and (hasattr(names["Solution"], candidate) or not is_own(candidate)):
        return getattr(names["Solution"](), candidate)
    if not is_own(candidate):
        raise NameError(candidate)
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

    It works on copies there. What it changes in lists, dicts, sets and objects that its arguments
    hold is then done here to the test's own, and to nothing else; a result that is one of them is
    the test's own.
    """

    def __init__(
        self,
        program: Program,
        candidate: str,
        names: Mapping[str, object],
        wants_changes: bool = True,
    ) -> None:
        self._program, self._candidate, self._names = program, candidate, names
        self._wants_changes = wants_changes

    def __call__(self, *positional: object, **named: object) -> Any:
        items: list[Any] = [[positional, named]]
        call = {
            "candidate": self._candidate,
            "arguments": pack_items(items),
            "wants_changes": self._wants_changes,
        }
        reply = self._program.ask(call)
        if "value" not in reply:
            raise exception_named(reply["raised"])
        known = items if reply["value"]["changes"] and self._wants_changes else []
        (result,) = unpack_items(reply["value"]["table"], self._names, known)[len(known)]
        return result


class RemoteNames(dict[str, object]):
    """A namespace in which every name that it lacks is a function of the program; so is the one
    under test, even where a built-in has its name."""

    def __init__(self, program: Program, tested: str) -> None:
        super().__init__()
        self._program, self._tested = program, tested

    def __missing__(self, name: str) -> Remote:
        if hasattr(builtins, name) and name != self._tested:
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
    candidate = Remote(program, request["candidate"], {}, wants_changes=False)
    return {"value": candidate(*request["arguments"])}


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
    exec(compile_source(tree, "<test>"), names)
    names["check"](candidate)
    return {"passed": True}


def assert_test(program: Program, request: dict[str, Any]) -> dict[str, object]:
    """Statements that name the program's functions themselves."""
    names = RemoteNames(program, request["candidate"])
    exec(compile_source(request["test"], "<test>"), names)
    return {"passed": True}


TESTS: dict[str, Callable[[Program, dict[str, Any]], dict[str, object]]] = {
    "call": call_test,
    "check": check_test,
    "assert": assert_test,
}


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
