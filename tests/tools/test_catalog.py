"""What `tools` settings become: tools, schemas without anything started, the runner, faults."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from sod_mcore.config import ConfigError, ToolsConfig
from sod_mcore.tools import (
    InfrastructureError,
    ProgramRunner,
    Sandbox,
    SandboxFusionClient,
    SandboxUnavailableError,
    Tool,
    ToolResult,
    ToolSchema,
    code_interpreter_schema,
    function_schema,
    make_runner,
    make_tool,
    make_tools,
    open_memory_group,
    tool_limits,
    tool_schemas,
)

MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def no_url_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOD_SANDBOX_URL", raising=False)


class LineCounter:
    """A user's tool, which runs a program of its own."""

    def __init__(self, limit: int, runner: ProgramRunner) -> None:
        self._limit = limit
        self._runner = runner

    @property
    def schema(self) -> ToolSchema:
        return function_schema("count_lines", "Counts lines.", {"text": "The text."})

    async def call(self, arguments: Mapping[str, object]) -> ToolResult:
        program = "import sys; print(len(sys.stdin.readlines()), end='')"
        result = await self._runner.run(program, stdin=str(arguments["text"]))
        return ToolResult(result.stdout[: self._limit], succeeded=True)


def make_line_counter(config: ToolsConfig, runner: ProgramRunner) -> Tool:
    """A factory as users write it."""
    return LineCounter(config.max_output_characters, runner)


OURS = f"{__name__}:make_line_counter"


@pytest.fixture
def documents(tmp_path: Path) -> str:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"title": "A", "text": "apples"}\n')
    return str(path)


@pytest.mark.asyncio
async def test_tools_work(sandbox: Sandbox, documents: str) -> None:
    names = ("code_interpreter", "calculator", "search", OURS)
    config = ToolsConfig(names=names, search_documents=documents, max_output_characters=20)
    tools = make_tools(config, sandbox)
    assert list(tools) == ["code_interpreter", "calculator", "search", "count_lines"]
    calls: list[tuple[str, str, str]] = [
        ("code_interpreter", "'x' * 30", "x" * 10 + "...(truncated)..." + "x" * 10),
        ("calculator", "10 ** 30", "1e+30"),
        ("search", "apples", "[1] A"),
        ("count_lines", "a\nb", "2"),
    ]
    arguments = {"code_interpreter": "code", "calculator": "expression", "search": "query"}
    for name, value, expected in calls:
        result = await tools[name].call({arguments.get(name, "text"): value})
        assert (result.text[: len(expected)], result.succeeded) == (expected, True)


def test_schemas_need_nothing(documents: str) -> None:
    config = ToolsConfig(
        names=("code_interpreter", "calculator", "search", OURS),
        search_documents="/does/not/exist",
        sandbox_url="http://127.0.0.1:9/run_code",
    )
    schemas = tool_schemas(config)
    assert schemas[0] == code_interpreter_schema()
    made = ToolsConfig(names=config.names, search_documents=documents)
    assert schemas == [tool.schema for tool in make_tools(made, Sandbox()).values()]
    assert tool_schemas(ToolsConfig(names=())) == []


@pytest.mark.asyncio
async def test_runner_of_schemas_runs_nothing() -> None:
    never_started = Sandbox()
    with pytest.raises(InfrastructureError, match="not started"):
        await make_tool(OURS, ToolsConfig(), never_started).call({"text": "a"})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("python",), "has 'python'; it must be one of code_interpreter, calculator, search, or"),
        (("no.such.module:f",), "cannot be imported .*No module named"),
        (("json:no_such_function",), "cannot be imported .*no_such_function"),
        ((":f",), "cannot be imported"),
        (("calculator", "calculator"), "two tools are called 'calculator'"),
        (("search",), r"tools\.search_documents is null"),
    ],
)
def test_faults_of_names(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"tools.names.*{message}"):
        make_tools(ToolsConfig(names=names), Sandbox())


class TestRunner:
    def test_local_by_default(self) -> None:
        config = ToolsConfig(wall_seconds=3.0, cpu_seconds=2, memory_mb=100, processes=4)
        runner = make_runner(config, tool_limits(config), max_concurrency=3)
        assert isinstance(runner, Sandbox)
        limits = runner.limits
        assert (limits.wall_seconds, limits.cpu_seconds) == (3.0, 2)
        assert (limits.memory_bytes, limits.processes) == (100 * MEBIBYTE, 4)

    def test_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limits = tool_limits(ToolsConfig())
        monkeypatch.setenv("SOD_SANDBOX_URL", "http://b/run_code")
        runner = make_runner(ToolsConfig(), limits, max_concurrency=3)
        assert isinstance(runner, SandboxFusionClient)
        assert runner.url == "http://b/run_code"
        config = ToolsConfig(sandbox_url="http://a/run_code")
        runner = make_runner(config, limits, max_concurrency=3)
        assert isinstance(runner, SandboxFusionClient)
        assert (runner.url, runner.limits) == ("http://a/run_code", limits)

    def test_total_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with open_memory_group(ToolsConfig()) as group:
            assert group is None
        config = ToolsConfig(total_memory_mb=100, sandbox_url="http://a/run_code")
        with (
            pytest.raises(ConfigError, match=r"tools\.total_memory_mb is 100, but programs run at"),
            open_memory_group(config),
        ):
            pass
        monkeypatch.setattr("sod_mcore.tools.memory_group.find_hierarchies", lambda *_: [])
        with (
            pytest.raises(SandboxUnavailableError, match=r"tools\.total_memory_mb = 100"),
            open_memory_group(ToolsConfig(total_memory_mb=100)),
        ):
            pass
