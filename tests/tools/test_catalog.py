"""What `tools` settings become: tools, schemas without anything started, the runner, faults."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from sod_mcore.tools.packages import package_folders

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


@pytest.mark.asyncio
async def test_tool_of_the_documentation() -> None:
    """Wrong arguments are a failed result, whatever the model sends."""
    text = (Path(__file__).parents[2] / "docs/tools.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(.*?class Dictionary.*?)```", text, re.DOTALL)
    assert source is not None
    names: dict[str, Any] = {"WORDS": {"sea": "Much water."}}
    exec(source[1], names)
    tool: Tool = names["make_tool"](ToolsConfig(), Sandbox())
    assert await tool.call({"word": "sea"}) == ToolResult("Much water.", succeeded=True)
    wrong: list[object] = [None, ["sea"], {}, "lake"]
    for word in wrong:
        assert not (await tool.call({"word": word})).succeeded


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

    def test_memory_that_is_too_little(self) -> None:
        with pytest.raises(ConfigError, match=r"tools\.memory_mb is 63; give at least 64"):
            tool_limits(ToolsConfig(memory_mb=63))

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


class TestPackages:
    @pytest.mark.asyncio
    async def test_programs_import_them(
        self, readable_directory: Path, nothing_left_behind: None
    ) -> None:
        """In order, through a link, with files of theirs, and without a way to change them."""
        for name, value in (("first", 1), ("second", 2)):
            package = readable_directory / name / "package_of_ours"
            package.mkdir(parents=True)
            (package / "__init__.py").write_text(f"VALUE = {value}")
            (package / f"only_{name}.py").touch()
        (readable_directory / "link").symlink_to(readable_directory / "first")
        folders = (str(readable_directory / "link"), str(readable_directory / "second"))
        config = ToolsConfig(packages=folders)
        program = (
            "import package_of_ours, package_of_ours.only_first\nprint(package_of_ours.VALUE)\n"
            "open(package_of_ours.__file__, 'w')"
        )
        async with make_runner(config, tool_limits(config), max_concurrency=1) as runner:
            result = await runner.run(program, short_traceback=True)
        assert result.stdout == "1\n"
        assert result.stderr.startswith("OSError: [Errno 30] Read-only file system")

    def test_faults(self, readable_directory: Path) -> None:
        def fault(folder: Path, **settings: Any) -> str:
            config = ToolsConfig(packages=(str(folder),), **settings)
            with pytest.raises(ConfigError) as error:
                make_runner(config, tool_limits(config), max_concurrency=1)
            assert "\n" not in str(error.value)
            return str(error.value)

        missing = readable_directory / "missing"
        assert fault(missing).startswith(f"tools.packages has '{missing}', which is no folder")
        missing.touch()
        assert "which is no folder" in fault(missing)
        elsewhere = fault(readable_directory, sandbox_url="http://a/run_code")
        assert elsewhere.endswith("set it to [] and give the server there --packages")

    @pytest.mark.parametrize("mode", [0o700, 0o711, 0o744])
    def test_folders_that_the_launch_user_may_not_read(
        self, readable_directory: Path, monkeypatch: pytest.MonkeyPatch, mode: int
    ) -> None:
        monkeypatch.setattr("sod_mcore.tools.packages.launch_user", lambda: 65534)
        folder = readable_directory / "packages"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(ConfigError) as error:
            package_folders([str(folder)], "--packages")
        message = f"--packages has '{folder}', but the user who runs the programs (id 65534) may"
        assert str(error.value).startswith(f"{message} not read {folder}; ")
        folder.chmod(0o755)
        assert package_folders([str(folder)], "--packages") == [folder]
        readable_directory.chmod(0o700)
        with pytest.raises(ConfigError, match=f"may not read {readable_directory}; make"):
            package_folders([str(folder)], "--packages")
