"""Makes what the `tools` section of the settings names: the tools, and what runs their programs.

Making a tool starts nothing and costs little, so those who only need schemas (to measure the length
of prompts) make them the same way, with a sandbox that is never started.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sod_mcore.config import ConfigError, ToolsConfig
from sod_mcore.tools.calculator import Calculator, calculator_schema
from sod_mcore.tools.code_interpreter import (
    CodeInterpreter,
    ToolOutputRule,
    code_interpreter_schema,
)
from sod_mcore.tools.interface import Tool, ToolSchema
from sod_mcore.tools.limits import MEBIBYTE, MINIMUM_MEMORY_BYTES, SandboxLimits
from sod_mcore.tools.memory_group import MemoryGroup
from sod_mcore.tools.packages import package_folders
from sod_mcore.tools.runner import ProgramRunner
from sod_mcore.tools.sandbox import Sandbox
from sod_mcore.tools.sandbox_fusion import SandboxFusionClient, choose_sandbox_url
from sod_mcore.tools.search import Index, Search, read_documents, search_schema
from sod_mcore.user_functions import import_function

ToolFactory = Callable[[ToolsConfig, ProgramRunner], Tool]
"""Makes a tool from the settings. It may keep the runner, which is started before the first call,
and must not run anything itself."""


def tool_limits(config: ToolsConfig) -> SandboxLimits:
    """What one program of a tool may use.

    Raises:
        ConfigError: it is less than Python itself needs.
    """
    least = MINIMUM_MEMORY_BYTES // MEBIBYTE
    if config.memory_mb < least:
        raise ConfigError(f"tools.memory_mb is {config.memory_mb}; give at least {least}")
    return SandboxLimits(
        wall_seconds=config.wall_seconds,
        cpu_seconds=config.cpu_seconds,
        memory_bytes=config.memory_mb * MEBIBYTE,
        processes=config.processes,
    )


@contextmanager
def open_memory_group(config: ToolsConfig) -> Iterator[MemoryGroup | None]:
    """The bound of all programs of the local sandbox together, if one is asked for.

    Raises:
        ConfigError: it is asked for while another machine runs the programs.
        SandboxUnavailableError: no control group can be made here.
    """
    total = config.total_memory_mb
    if total is None:
        yield None
        return
    url = choose_sandbox_url(config.sandbox_url)
    if url is not None:
        raise ConfigError(
            f"tools.total_memory_mb is {total}, but programs run at {url}; set it to null and give "
            "the server there --total-memory-mb"
        )
    with MemoryGroup.create(total * MEBIBYTE) as group:
        yield group


def make_runner(
    config: ToolsConfig,
    limits: SandboxLimits,
    *,
    max_concurrency: int,
    memory_group: MemoryGroup | None = None,
) -> Sandbox | SandboxFusionClient:
    """What runs programs, here or elsewhere: not started, an asynchronous context manager.

    Args:
        config: says where, and which packages programs find.
        limits: of one program.
        max_concurrency: programs at a time.
        memory_group: of the local sandbox; may be shared by several.

    Raises:
        ConfigError: the address of the endpoint is none, or packages cannot be shown.
    """
    url = choose_sandbox_url(config.sandbox_url)
    if url is not None:
        if config.packages:
            raise ConfigError(
                f"tools.packages is {list(config.packages)}, but programs run at {url}; set it to "
                "[] and give the server there --packages"
            )
        return SandboxFusionClient(url, limits, max_concurrency=max_concurrency)
    return Sandbox(
        limits,
        max_concurrency=max_concurrency,
        package_paths=package_folders(config.packages, "tools.packages"),
        allow_unisolated=config.run_code_without_isolation,
        memory_group=memory_group,
    )


def make_tools(config: ToolsConfig, runner: ProgramRunner) -> dict[str, Tool]:
    """The tools of `tools.names`, by the name that the model calls.

    Raises:
        ConfigError: a name is unknown, cannot be imported or occurs twice, or a tool lacks a
            setting.
    """
    tools: dict[str, Tool] = {}
    for name in config.names:
        tool = make_tool(name, config, runner)
        called = schema_name(tool.schema)
        if called in tools:
            raise ConfigError(f"tools.names: two tools are called {called!r}; name it once")
        tools[called] = tool
    return tools


def make_tool(name: str, config: ToolsConfig, runner: ProgramRunner) -> Tool:
    """The tool of that name; see `make_tools`."""
    return _find_factory(name)(config, runner)


def tool_schemas(config: ToolsConfig) -> list[ToolSchema]:
    """The schemas of `tools.names` as shown to the model; nothing is started and no file is read.

    Raises:
        ConfigError: as `make_tools`.
    """
    never_started = Sandbox(tool_limits(config))
    return [
        _BUILT_IN[name][0]() if name in _BUILT_IN else make_tool(name, config, never_started).schema
        for name in config.names
    ]


def schema_name(schema: ToolSchema) -> str:
    """What the model writes to call the tool."""
    function = schema["function"]
    assert isinstance(function, dict)
    return str(function["name"])


def _make_code_interpreter(config: ToolsConfig, runner: ProgramRunner) -> Tool:
    return CodeInterpreter(
        runner, ToolOutputRule(config.max_output_characters, config.truncation, config.traceback)
    )


def _make_calculator(config: ToolsConfig, runner: ProgramRunner) -> Tool:
    return Calculator(max_characters=config.max_output_characters)


def _make_search(config: ToolsConfig, runner: ProgramRunner) -> Tool:
    if config.search_documents is None:
        raise ConfigError(
            "tools.names has search, but tools.search_documents is null; give a JSONL file of "
            '{"title", "text"}'
        )
    index = Index(read_documents(Path(config.search_documents)))
    return Search(index, max_characters=config.max_output_characters)


_BUILT_IN: dict[str, tuple[Callable[[], ToolSchema], ToolFactory]] = {
    CodeInterpreter.name: (code_interpreter_schema, _make_code_interpreter),
    Calculator.name: (calculator_schema, _make_calculator),
    Search.name: (search_schema, _make_search),
}


def _find_factory(name: str) -> ToolFactory:
    if name in _BUILT_IN:
        return _BUILT_IN[name][1]
    choices = f"one of {', '.join(_BUILT_IN)}, or a function of yours as package.module:function"
    return import_function("tools.names has", name, choices)
