"""Looks at Python sources without running them: what compiles, and which tests stand in a check.

The text of this file stands between those of ``values.py`` and ``driver.py`` in what is
sent to a sandbox, since only there a program under test may be read; so only the standard library,
and nothing newer than Python 3.10. The package itself reads the tests of data rows with it.
"""

from __future__ import annotations

import _ast

TYPE_CHECKING = False  # as in typing, which is not needed here otherwise
if TYPE_CHECKING:
    from typing import Any


def inspect_sources(request: dict[str, Any]) -> dict[str, object]:
    """The first reading of the program that compiles, and the number of the test's asserts."""
    report: dict[str, object] = {"reading": None, "tests": None, "broken": None}
    try:
        compile_source(request["preamble"], "<preamble>")
        check = find_check(parse(request["test"]))
        report["tests"] = None if check is None else len(tests_of(check))
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        report["broken"] = str(error) or type(error).__name__
    readings = enumerate(request["readings"])
    compiling = (index for index, sources in readings if all(map(compiles, sources)))
    report["reading"] = next(compiling, None)
    return report


def compiles(source: str) -> bool:
    """Whether the compiler takes a source, whatever it says to it."""
    try:
        compile_source(source, "<code>")
    except Exception:
        return False
    return True


def parse(source: str) -> Any:
    """The syntax tree of a module."""
    return compile_source(source, "<test>", flags=_ast.PyCF_ONLY_AST)


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


def compile_source(source: Any, name: str, mode: str = "exec", flags: int = 0) -> Any:
    """Compile, not as if a source began with the future import of this text."""
    return compile(source, name, mode, flags, dont_inherit=True)
