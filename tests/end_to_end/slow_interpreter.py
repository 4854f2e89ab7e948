"""The code interpreter with programs that take their time, so that some run when a drill kills."""

from __future__ import annotations

from collections.abc import Mapping

from sod_mcore.config import ToolsConfig
from sod_mcore.tools.code_interpreter import CodeInterpreter, ToolOutputRule, extract_program
from sod_mcore.tools.interface import ToolResult
from sod_mcore.tools.runner import ProgramRunner

SECONDS = 1.0


class SlowInterpreter(CodeInterpreter):
    """As the model knows it."""

    async def call(self, arguments: Mapping[str, object]) -> ToolResult:
        """Sleep in the sandbox, then run the program."""
        code = arguments.get("code")
        if not isinstance(code, str):
            return await super().call(arguments)
        slow = f"import time; time.sleep({SECONDS})\n{extract_program(code)}"
        return await super().call({"code": slow})


def make(config: ToolsConfig, runner: ProgramRunner) -> SlowInterpreter:
    """The tool for ``tools.names``."""
    return SlowInterpreter(runner, ToolOutputRule(traceback=config.traceback))
