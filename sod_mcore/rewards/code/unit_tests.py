"""Reads the ground truth of a code problem, in the four forms in which data sets have it.

- `{"inputs", "outputs"}`: standard input and output of whole programs;
- the same with `"fn_name"`: calls of a function. An input is a text with the JSON of one argument
  a line (LiveCodeBench) or a list of arguments (TACO); with `"assert_case"`, a text that is not
  empty takes the place of the input and output at its position, and asserts something; see
  `asserts.py` for what it may do;
- `{"entry_point", "import_prefix", "test_code"}` (LeetCode): `test_code` defines
  `check(candidate)`, in which each asserting statement is one test;
- `{"entry_point", "prompt", "test"}` (HumanEval): the whole `check(candidate)` is one test.

A ground truth is data, not a program under test: it is read here as JSON or as a Python literal.
"""

import ast
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sod_mcore.rewards.code.asserts import refusal
from sod_mcore.rewards.code.cases import (
    AssertCase,
    CallCase,
    Case,
    CheckCase,
    ExpectedValue,
    Inspection,
    StdinCase,
)
from sod_mcore.rewards.code.sources import inspect_sources

_MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools "
    "operator io sys json builtins typing"
)
# The built-ins come late: math and operator have a pow of their own, for example.
CALL_PRELUDE = (
    "".join(f"from {name} import *\n" for name in _MODULES.split())
    + "".join(f"import {name}\n" for name in _MODULES.split())
    + "sys.setrecursionlimit(50000)\n"
)
"""What solutions of call-based problems may take for granted, as on the sites they come from: the
starter code of such problems already writes `List[int]`. Modelled on LiveCodeBench's."""


class CodeTests(Protocol):
    """The tests of one problem."""

    @property
    def preamble(self) -> str:
        """Source that the test needs before it."""
        ...

    @property
    def test(self) -> str:
        """Source of the test; empty where there is none."""
        ...

    def readings(self, program: str) -> Sequence[Sequence[str]]:
        """The ways to take an answer, the first that compiles counts: each is a list of sources
        that make the program together."""
        ...

    def cases(self, sources: Sequence[str], inspection: Inspection) -> Sequence[Case]:
        """The tests of a program.

        Raises:
            ValueError: the test's source is unusable.
        """
        ...


@dataclass(frozen=True)
class StdinTests:
    """Whole programs: texts in, texts out."""

    inputs: Sequence[str]
    outputs: Sequence[str | None]
    preamble: str = ""
    test: str = ""

    def readings(self, program: str) -> Sequence[Sequence[str]]:
        """The answer is the program."""
        return [[program]]

    def cases(self, sources: Sequence[str], inspection: Inspection) -> Sequence[Case]:
        """One for each input."""
        (program,) = sources
        pairs = zip(self.inputs, self.outputs, strict=True)
        return [StdinCase(program, stdin, expected) for stdin, expected in pairs]


@dataclass(frozen=True)
class CallTests:
    """Calls of one function.

    Attributes:
        function: its name; it may be a method of a class Solution.
        calls: arguments and what should be returned, or an asserting text.
    """

    function: str
    calls: Sequence[tuple[list[object], ExpectedValue] | str]
    preamble: str = ""
    test: str = ""

    def readings(self, program: str) -> Sequence[Sequence[str]]:
        """The answer behind the usual imports."""
        return [[CALL_PRELUDE, program]]

    def cases(self, sources: Sequence[str], inspection: Inspection) -> Sequence[Case]:
        """One for each call."""
        return [
            AssertCase(sources, self.function, call)
            if isinstance(call, str)
            else CallCase(sources, self.function, *call)
            for call in self.calls
        ]


@dataclass(frozen=True)
class LeetCodeTests:
    """Asserts about a method; `preamble` holds the imports and the classes of nodes and lists."""

    candidate: str
    preamble: str
    test: str

    def readings(self, program: str) -> Sequence[Sequence[str]]:
        """The answer behind the preamble."""
        return [[self.preamble, program]]

    def cases(self, sources: Sequence[str], inspection: Inspection) -> Sequence[Case]:
        """One for each asserting statement; all together where there is none to be seen."""
        count = _count_tests(inspection, "test_code", self.test)
        return [
            CheckCase(sources, self.candidate, self.preamble, self.test, only)
            for only in (range(count) if count else [None])
        ]


@dataclass(frozen=True)
class HumanEvalTests:
    """One check of a function; `preamble` is the prompt, which the answer completes or repeats."""

    candidate: str
    preamble: str
    test: str

    def readings(self, program: str) -> Sequence[Sequence[str]]:
        """A whole function, which may need what the prompt defines; or else its body."""
        return [[self.preamble, program], [self.preamble + program]]

    def cases(self, sources: Sequence[str], inspection: Inspection) -> Sequence[Case]:
        """A single one."""
        _count_tests(inspection, "test", self.test)
        return [CheckCase(sources, self.candidate, self.preamble, self.test)]


def read_tests(ground_truth: str) -> CodeTests:
    """The tests of a data row.

    Raises:
        ValueError: none of the forms above; the message names the field, its value and the mend.
    """
    row = _read_row(ground_truth)
    if "test_code" in row:
        return LeetCodeTests(
            _expression(row, "entry_point"), _text(row, "import_prefix"), _text(row, "test_code")
        )
    if "test" in row:
        return HumanEvalTests(
            _expression(row, "entry_point"), _text(row, "prompt"), _text(row, "test")
        )
    if "inputs" in row:
        return _read_inputs(row)
    raise ValueError(
        f"ground_truth has the fields {', '.join(sorted(row)) or 'none'}: give inputs and outputs; "
        "or entry_point, import_prefix and test_code; or entry_point, prompt and test"
    )


def check_tests(ground_truth: str) -> None:
    """Refuse a data row that a verifier would refuse, without running anything.

    Raises:
        ValueError: in one line, the field, its value and the mend.
    """
    problem = read_tests(ground_truth)
    request = {"readings": [], "preamble": problem.preamble, "test": problem.test}
    with warnings.catch_warnings(action="ignore"):
        report: dict[str, Any] = inspect_sources(request)
    problem.cases(problem.readings("")[0], Inspection(0, report["tests"], report["broken"]))


def _read_row(ground_truth: str) -> dict[str, Any]:
    value: object = ground_truth
    for _ in range(2):  # a struct may have been written as JSON text twice
        if isinstance(value, str):
            value = _read_text(value)
    if not isinstance(value, dict):
        raise ValueError(f"ground_truth = {_short(ground_truth)}: give a JSON object")
    return value


def _read_text(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            # The reference reads its rows as Python literals, so some may be.
            return json.loads(json.dumps(ast.literal_eval(text)))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            message = f"ground_truth = {_short(text)}: give a JSON object ({error})"
            raise ValueError(message) from error


def _read_inputs(row: dict[str, Any]) -> CodeTests:
    inputs, outputs = _list(row, "inputs"), _list(row, "outputs")
    asserts = _list(row, "assert_case") if row.get("assert_case") else [""] * len(inputs)
    for name, values in (("outputs", outputs), ("assert_case", asserts)):
        if len(values) != len(inputs):
            raise ValueError(
                f"ground_truth[{name!r}] has {len(values)} items, inputs has {len(inputs)}: "
                "give one for each input"
            )
    if not inputs:
        raise ValueError("ground_truth['inputs'] = []: give at least one test")
    if not row.get("fn_name") and not any(asserts):
        return StdinTests(
            [_joined_lines("inputs", value) for value in inputs],
            [None if value is None else _joined_lines("outputs", value) for value in outputs],
        )
    for text in asserts:
        _check_assert(text)
    if not all(asserts):
        _expression(row, "fn_name")
    return CallTests(
        _expression(row, "fn_name") if row.get("fn_name") else "",
        [
            text or (_read_arguments(value), _read_expected(value, output))
            for value, output, text in zip(inputs, outputs, asserts, strict=True)
        ],
    )


def _check_assert(text: object) -> None:
    if text and not isinstance(text, str):
        raise ValueError(
            f"an item of ground_truth['assert_case'] = {_short(text)}: give a text, or an empty one"
        )
    reason = refusal(text) if isinstance(text, str) else None
    if reason is not None:
        raise ValueError(
            f"an item of ground_truth['assert_case'] = {_short(text)}: {reason}. Give statements "
            "that call functions of the program by their names and assert something of the plain "
            "values that they return; import and define there what else they need"
        )


def _read_arguments(value: object) -> list[object]:
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise ValueError(
            f"an item of ground_truth['inputs'] = {_short(value)}: with fn_name, give a list of "
            "arguments, or a text with the JSON of one argument a line"
        )
    try:
        return [json.loads(line) for line in value.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"an item of ground_truth['inputs'] = {_short(value)}: with fn_name, give the JSON of "
            f"one argument a line ({error})"
        ) from error


def _read_expected(call_input: object, output: object) -> ExpectedValue:
    if not isinstance(call_input, str):
        return ExpectedValue(output, is_wrapped=True)
    if not isinstance(output, str):
        return ExpectedValue(output)
    try:
        return ExpectedValue(json.loads(output), text=output)
    except (ValueError, RecursionError):
        return ExpectedValue(output)


def _count_tests(inspection: Inspection, name: str, test: str) -> int:
    if inspection.broken is not None or inspection.tests is None:
        reason = inspection.broken or "it defines no function check"
        raise ValueError(
            f"ground_truth[{name!r}] = {_short(test)}: {reason}. Give Python source that defines "
            "check(candidate)"
        )
    return inspection.tests


def _joined_lines(name: str, value: object) -> str:
    """A text; APPS has lists of its lines in places."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if isinstance(value, str):
        return value
    raise ValueError(
        f"an item of ground_truth[{name!r}] = {_short(value)}: without fn_name, give a text"
    )


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"ground_truth[{name!r}] = {_short(value)}: give a text")
    return value


def _expression(row: dict[str, Any], name: str) -> str:
    """The name of a function, or an expression such as `Solution().f`."""
    text = _text(row, name)
    try:
        ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"ground_truth[{name!r}] = {_short(text)}: give the name of a function, or an "
            "expression such as Solution().name"
        ) from error
    return text


def _list(row: dict[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise ValueError(f"ground_truth[{name!r}] = {_short(value)}: give a list")
    return value


def _short(value: object) -> str:
    """A value for a message: ground truths may have megabytes."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
