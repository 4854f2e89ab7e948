"""What the tests of the code verifier share: answers, a runner that is none, and mutants."""

import ast
import asyncio
import json
from collections.abc import Callable

from sod_mcore.tools import SandboxLimits, SandboxResult


def fenced(program: str, label: str = "python") -> str:
    """A final turn that hands in a program."""
    return f"This is my program:\n```{label}\n{program}\n```\nIt is right."


def finished(stdout: str = "", return_code: int = 0) -> SandboxResult:
    """The result of a program that ended by itself."""
    return SandboxResult(stdout, "", return_code, "finished", 0.01)


class FakeRunner:
    """Answers like a sandbox, without one: every source compiles, and a program's result is a
    function of its standard input."""

    def __init__(self, answer: Callable[[str], SandboxResult], seconds: float = 0.0) -> None:
        self.limits = SandboxLimits()
        self.inputs: list[str] = []
        self._answer = answer
        self._seconds = seconds

    async def run(
        self,
        code: str,
        *,
        stdin: str = "",
        print_last_expression: bool = False,
        short_traceback: bool = False,
    ) -> SandboxResult:
        """Inspections are answered at once, programs after the given time."""
        if '"mode": "inspect"' in stdin:
            report = {"reading": 0, "tests": None, "broken": None}
            return finished(json.loads(stdin)["marker"] + json.dumps(report))
        self.inputs.append(stdin)
        await asyncio.sleep(self._seconds)
        return self._answer(stdin)


_OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


def negated_comparison(source: str, function: str) -> str | None:
    """The source with the first comparison in a function negated; None if it compares nothing."""
    tree = ast.parse(source)
    for node in ast.walk(_function(tree, function)):
        if isinstance(node, ast.Compare):
            node.ops[0] = _OPPOSITES[type(node.ops[0])]()
            return ast.unparse(tree)
    return None


def constant_result(source: str, function: str) -> str:
    """The source with a function that returns a constant which no problem asks for."""
    tree = ast.parse(source)
    _function(tree, function).body = ast.parse("return 987654321.125").body
    return ast.unparse(tree)


def _function(tree: ast.Module, name: str) -> ast.FunctionDef:
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return next(node for node in reversed(functions) if node.name == name)
