"""One test of one program, each in an interpreter of its own.

A program that reads standard input is run as it is, and what it printed is compared here. A
function is called by the driver (``driver.py``): either its value is compared here, or the
driver runs a test that asserts something, in a process that the program does not live in.
"""

import asyncio
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGXCPU
from typing import Any, Literal, Protocol, TypeVar

from sod_mcore.rewards.code.compare import same_output, same_value
from sod_mcore.tools import InfrastructureError, ProgramRunner, SandboxResult

_T = TypeVar("_T")

Outcome = Literal["passed", "failed", "stopped"]
"""Of one test; "stopped" by a limit of time, memory or output."""

_FUTURE_IMPORT = "from __future__ import annotations\n"
_SIGNALS_OF_LIMITS = (SIGKILL, SIGXCPU)
LARGE_TEXT = 65536
"""Characters. What reads or compares more leaves the event loop meanwhile."""
_LONGEST_SPELLING = 16
"""Characters of a report for one of the expected value: `0,` may come as `-1.2345678901234567e-16,`
and one character as two escapes."""


async def off_loop(characters: int, function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function in a thread if it has a large text to work on."""
    if characters <= LARGE_TEXT:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


class Case(Protocol):
    """One test."""

    async def run(self, runner: ProgramRunner) -> Outcome:
        """Do the test.

        Raises:
            InfrastructureError: nothing is known about the program.
        """
        ...


@dataclass(frozen=True)
class StdinCase:
    """The program reads a text and prints another; None expects only that it ends well."""

    program: str
    stdin: str
    expected: str | None

    async def run(self, runner: ProgramRunner) -> Outcome:
        """Compare what is printed, see ``same_output``. An exit code other than 0 is a failure."""
        result = await runner.run(self.program, stdin=self.stdin)
        if result.status != "finished":
            return "stopped"
        if result.return_code != 0:
            return "failed"
        if self.expected is None:
            return "passed"
        characters = len(result.stdout) + len(self.expected)
        is_right = await off_loop(characters, same_output, result.stdout, self.expected)
        return "passed" if is_right else "failed"


@dataclass(frozen=True)
class ExpectedValue:
    """What a call should return.

    Attributes:
        value: the value, as JSON has it.
        text: it as the data row writes it; a function may return this text itself.
        is_wrapped: the value may stand in a list of one, as in the rows of TACO and APPS.
    """

    value: object
    text: str | None = None
    is_wrapped: bool = False

    def accepts(self, actual: object) -> bool:
        """Whether a returned value is right."""
        if same_value(actual, self.value) or (self.text is not None and actual == self.text):
            return True
        wrapped = self.value if self.is_wrapped and isinstance(self.value, list) else []
        return len(wrapped) == 1 and same_value(actual, wrapped[0])

    def may_be(self, report_text: str) -> bool:
        """Whether a report is short enough to hold the value, however it is spelt."""
        if len(report_text) <= LARGE_TEXT:
            return True
        text = json.dumps(self.value) if self.text is None else self.text
        return len(report_text) <= LARGE_TEXT + _LONGEST_SPELLING * len(text)


@dataclass(frozen=True)
class CallCase:
    """A call whose value is compared outside: it never comes near the program."""

    sources: Sequence[str]
    function: str
    arguments: Sequence[object]
    expected: ExpectedValue

    async def run(self, runner: ProgramRunner) -> Outcome:
        """Call the function once."""
        request = {
            "mode": "call",
            "sources": self.sources,
            "candidate": self.function,
            "arguments": self.arguments,
        }
        text = await _drive(runner, request)
        return await off_loop(len(text), self._outcome, text)

    def _outcome(self, report_text: str) -> Outcome:
        """Far more than was expected is wrong, and not read."""
        if not self.expected.may_be(report_text):
            return "failed"
        report = _read_report(report_text)
        is_right = "value" in report and self.expected.accepts(report["value"])
        return "passed" if is_right else _failure(report)


@dataclass(frozen=True)
class CheckCase:
    """The test's function ``check(candidate)``, or one of its asserting statements.

    Attributes:
        sources: what makes the program, run in one namespace.
        candidate: the function under test: a name or an expression.
        preamble: what the test needs beside the program.
        test: source that defines ``check``.
        only: position of the one statement to be tested; None for all.
    """

    sources: Sequence[str]
    candidate: str
    preamble: str
    test: str
    only: int | None = None

    async def run(self, runner: ProgramRunner) -> Outcome:
        """Run the test; only its normal end counts as passed."""
        request = {
            "mode": "check",
            "sources": self.sources,
            "candidate": self.candidate,
            "preamble": self.preamble,
            "test": self.test,
            "only": self.only,
        }
        return _passed(await _drive(runner, request))


@dataclass(frozen=True)
class AssertCase:
    """Statements that call the program's functions by their names.

    Attributes:
        sources: what makes the program, run in one namespace.
        candidate: the function under test, where it is known; a built-in may have its name.
        test: source of the statements.
    """

    sources: Sequence[str]
    candidate: str
    test: str

    async def run(self, runner: ProgramRunner) -> Outcome:
        """Run the statements; only their normal end counts as passed."""
        request = {
            "mode": "assert",
            "sources": self.sources,
            "candidate": self.candidate,
            "test": self.test,
        }
        return _passed(await _drive(runner, request))


@dataclass(frozen=True)
class Inspection:
    """What is known before any line of the program has run.

    Attributes:
        reading: position of the first reading of the answer that compiles, or None.
        tests: asserting statements in the test's ``check``; None if there is no ``check``.
        broken: why the test does not compile, or None.
    """

    reading: int | None
    tests: int | None
    broken: str | None


async def inspect(
    runner: ProgramRunner, readings: Sequence[Sequence[str]], preamble: str = "", test: str = ""
) -> Inspection:
    """Compile the program and its test in the sandbox, without running them.

    Raises:
        InfrastructureError: the sandbox cannot do that.
    """
    request = {"mode": "inspect", "readings": readings, "preamble": preamble, "test": test}
    report = _read_report(await _drive(runner, request))
    # Without a report the compiler took too long, or was crashed by what it read.
    return Inspection(report.get("reading"), report.get("tests"), report.get("broken"))


def _passed(report_text: str) -> Outcome:
    report = _read_report(report_text) if len(report_text) <= LARGE_TEXT else {}
    return "passed" if report.get("passed") is True else _failure(report)


def _failure(report: Mapping[str, Any]) -> Outcome:
    return "stopped" if report.get("signal") in _SIGNALS_OF_LIMITS else "failed"


async def _drive(runner: ProgramRunner, request: Mapping[str, object]) -> str:
    """The JSON text of the driver's report; where it made none, of the signal that stopped it."""
    marker = secrets.token_hex(16)
    text = json.dumps({**request, "marker": marker, "driver": _DRIVER})
    result = await runner.run(_DRIVER, stdin=text)
    _, found, report_text = result.stdout.rpartition(marker)
    if not found:
        report = _end_without_report(result, nothing_ran=request["mode"] == "inspect")
        return json.dumps(report)
    return report_text


def _read_report(text: str) -> Mapping[str, Any]:
    try:
        report: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        return {}  # a value that this Python does not read, such as a number of 5000 digits
    if "infrastructure" in report:
        raise InfrastructureError(str(report["infrastructure"]))
    return report


def _end_without_report(result: SandboxResult, nothing_ran: bool) -> Mapping[str, Any]:
    if result.status != "finished":
        return {"signal": int(SIGKILL)}
    if nothing_ran and result.return_code == 1:
        # An exception, where no line of the program had run.
        raise InfrastructureError(f"the code driver failed in the sandbox: {result.stderr[-500:]}")
    return {}


def _driver_source() -> str:
    """The driver as one text. A future import may stand only at its beginning."""
    values, *others = (
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("values.py", "sources.py", "driver.py")
    )
    return values + "".join(others).replace(_FUTURE_IMPORT, "")


_DRIVER = _driver_source()
