"""Tools that a model may call: their schemas, the code interpreter, and the sandbox it runs in."""

from sod_mcore.tools.code_interpreter import (
    CodeInterpreter,
    ToolOutputRule,
    code_interpreter_schema,
)
from sod_mcore.tools.interface import (
    InfrastructureError,
    SandboxUnavailableError,
    Tool,
    ToolResult,
    ToolSchema,
    function_schema,
)
from sod_mcore.tools.limits import SandboxLimits
from sod_mcore.tools.sandbox import Sandbox, SandboxResult

__all__ = [
    "CodeInterpreter",
    "InfrastructureError",
    "Sandbox",
    "SandboxLimits",
    "SandboxResult",
    "SandboxUnavailableError",
    "Tool",
    "ToolOutputRule",
    "ToolResult",
    "ToolSchema",
    "code_interpreter_schema",
    "function_schema",
]
