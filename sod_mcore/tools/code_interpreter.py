"""The `code_interpreter` tool: runs the model's Python and words what happened as an observation.

The last expression's value is shown as a notebook would show it. This is decided on the syntax
tree: rewriting the last line as text breaks loops, assignments and trailing comments.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sod_mcore.tools.interface import ToolResult, ToolSchema, function_schema
from sod_mcore.tools.limits import SandboxLimits
from sod_mcore.tools.runner import ProgramRunner, SandboxResult

_FENCED_PYTHON = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```", re.DOTALL)
_CUT = "...(truncated)..."

Side = Literal["middle", "left", "right", "last_line"]
Traceback = Literal["full", "last_line"]


@dataclass(frozen=True)
class ToolOutputRule:
    """How much of a program's output the model reads.

    Attributes:
        max_characters: longer output is cut; the mark of the cut comes on top.
        side: what is left of longer output: "middle" keeps both ends, "left" the beginning,
            "right" the end, "last_line" the last line that is not blank (both its ends, if that
            is too long as well).
        traceback: of an uncaught exception, the whole traceback or its message only.
    """

    max_characters: int = 256
    side: Side = "middle"
    traceback: Traceback = "full"

    def __post_init__(self) -> None:
        """Raises ValueError for values that are not listed above."""
        if self.max_characters < 2:
            raise ValueError(
                f"ToolOutputRule.max_characters = {self.max_characters}: give at least 2"
            )
        for name, allowed in (("side", get_args(Side)), ("traceback", get_args(Traceback))):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"ToolOutputRule.{name} = {value!r}: give one of {', '.join(allowed)}"
                )

    def cut(self, text: str) -> str:
        """`text`, or what this rule leaves of it."""
        size = self.max_characters
        if len(text) <= size:
            return text
        match self.side:
            case "left":
                return text[:size] + _CUT
            case "right":
                return _CUT + text[-size:]
            case "last_line":
                last_line = text.rstrip().rpartition("\n")[2]
                if len(last_line) <= size:
                    return f"{_CUT}\n{last_line}"
                return _keep_both_ends(last_line, size)
            case "middle":
                return _keep_both_ends(text, size)


def _keep_both_ends(text: str, size: int) -> str:
    half = size // 2
    return text[:half] + _CUT + text[-half:]


def extract_program(text: str) -> str:
    """The first fenced Python block of `text`, or all of it where there is none."""
    block = _FENCED_PYTHON.search(text)
    return text if block is None else block[1].strip("\n")


def describe_end(result: SandboxResult, limits: SandboxLimits) -> str:
    """Why a program ended, if its own output does not tell; otherwise empty."""
    match result.status:
        case "timeout":
            return f"Execution timed out after {limits.wall_seconds:g} s."
        case "output_limit":
            return f"Execution was stopped: it printed more than {limits.output_bytes} bytes."
        case "killed":
            return "Execution was killed: it used too much CPU time or memory."
        case "finished":
            if result.return_code and not result.stderr:
                return f"Execution failed with exit code {result.return_code}."
            return ""


def code_interpreter_schema() -> ToolSchema:
    """The schema of the tool, for those who only show it."""
    return function_schema(
        CodeInterpreter.name, "A tool for executing code.", {"code": "The code to execute."}
    )


class CodeInterpreter:
    """The tool. Each call runs in an interpreter of its own: nothing is kept between calls."""

    name = "code_interpreter"

    def __init__(self, runner: ProgramRunner, rule: ToolOutputRule | None = None) -> None:
        """`runner` is started and closed by its owner."""
        self._runner = runner
        self._rule = rule or ToolOutputRule()

    @property
    def schema(self) -> ToolSchema:
        """The function schema as shown to the model."""
        return code_interpreter_schema()

    async def call(self, arguments: Mapping[str, object]) -> ToolResult:
        """Run `arguments["code"]`; other arguments are ignored, the limits are not the model's.

        Raises:
            InfrastructureError: the sandbox is broken.
        """
        code = arguments.get("code")
        if not isinstance(code, str):
            text = "Error when executing tool: give one argument, `code`, a string."
            return ToolResult(text, succeeded=False)
        result = await self._runner.run(
            extract_program(code),
            print_last_expression=True,
            short_traceback=self._rule.traceback == "last_line",
        )
        return self._observation(result)

    def _observation(self, result: SandboxResult) -> ToolResult:
        # Without print's last newline: the chat template ends the observation with one of its own.
        output = self._rule.cut((result.stdout + result.stderr).removesuffix("\n"))
        end = describe_end(result, self._runner.limits)
        if output and end and not output.endswith("\n"):
            output += "\n"
        return ToolResult(
            output + end, succeeded=result.status == "finished" and result.return_code == 0
        )
