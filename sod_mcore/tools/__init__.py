"""Tools that a model may call, and what runs its programs: a local sandbox, or another machine."""

from sod_mcore.tools.calculator import Calculator
from sod_mcore.tools.catalog import (
    ToolFactory,
    make_runner,
    make_tool,
    make_tools,
    open_memory_group,
    tool_limits,
    tool_schemas,
)
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
from sod_mcore.tools.memory_group import MemoryGroup
from sod_mcore.tools.runner import ProgramRunner, SandboxResult
from sod_mcore.tools.sandbox import Sandbox
from sod_mcore.tools.sandbox_fusion import RetryRule, SandboxFusionClient, choose_sandbox_url
from sod_mcore.tools.search import Search

__all__ = [
    "Calculator",
    "CodeInterpreter",
    "InfrastructureError",
    "MemoryGroup",
    "ProgramRunner",
    "RetryRule",
    "Sandbox",
    "SandboxFusionClient",
    "SandboxLimits",
    "SandboxResult",
    "SandboxUnavailableError",
    "Search",
    "Tool",
    "ToolFactory",
    "ToolOutputRule",
    "ToolResult",
    "ToolSchema",
    "choose_sandbox_url",
    "code_interpreter_schema",
    "function_schema",
    "make_runner",
    "make_tool",
    "make_tools",
    "open_memory_group",
    "tool_limits",
    "tool_schemas",
]
