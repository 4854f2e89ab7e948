"""What the model reads after its program ran, against the vectors C1 and T1 of the method."""

import pytest

from sod_mcore.tools import (
    CodeInterpreter,
    InfrastructureError,
    Sandbox,
    SandboxLimits,
    Tool,
    ToolOutputRule,
    ToolResult,
)
from sod_mcore.tools.code_interpreter import extract_program


def test_schema() -> None:
    tool: Tool = CodeInterpreter(Sandbox())
    assert tool.schema == {
        "type": "function",
        "function": {
            "name": "code_interpreter",
            "description": "A tool for executing code.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "The code to execute."}},
                "required": ["code"],
            },
        },
    }


class TestToolOutputRule:
    def test_middle(self) -> None:
        rule = ToolOutputRule()
        text = "a" * 128 + "b" * 128
        assert rule.cut(text) == text
        assert rule.cut("a" * 128 + "-" + "b" * 128) == (
            "a" * 128 + "...(truncated)..." + "b" * 128
        )

    @pytest.mark.parametrize(
        ("side", "expected"),
        [
            ("left", "abc\nd...(truncated)..."),
            ("right", "...(truncated)...\nfgh\n"),
            ("middle", "ab...(truncated)...h\n"),
            ("last_line", "...(truncated)...\nfgh"),
        ],
    )
    def test_sides(self, side: str, expected: str) -> None:
        assert ToolOutputRule(5, side).cut("abc\nde\nfgh\n") == expected  # type: ignore[arg-type]

    def test_long_last_line(self) -> None:
        assert ToolOutputRule(4, "last_line").cut("x\nabcdefgh\n") == "ab...(truncated)...gh"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_characters": 1}, "max_characters = 1"),
            ({"side": "top"}, "side = 'top'.*middle, left"),
            ({"traceback": "none"}, "traceback = 'none'.*full, last_line"),
        ],
    )
    def test_wrong_values(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ToolOutputRule(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("print(1)", "print(1)"),
        ("Here:\n```python\nx = 1\nx\n```\nand\n```python\ny\n```", "x = 1\nx"),
        ("```py\n  \nif a:\n    b\n```", "  \nif a:\n    b"),
        ("```\nprint(1)\n```", "```\nprint(1)\n```"),
    ],
)
def test_extract_program(text: str, program: str) -> None:
    assert extract_program(text) == program


@pytest.mark.asyncio
class TestCall:
    @pytest.mark.parametrize(
        ("code", "text"),
        [
            # C1, as it should be
            ("x=1\nx", "1"),
            ("for i in range(3):\n    print(i)", "0\n1\n2"),
            ("x = 3\nx * 2\n# done", "6"),
            ("3 * 2  # twice", "6"),
            ("x = 5", ""),
            # never twice, never None
            ("print(7)", "7"),
            ("print(\n    7,\n)", "7"),
            ("[].append(1)", ""),
            ("None", ""),
            # strings as `print` shows them
            ("'a\\nb'", "a\nb"),
            ("import math\nmath.pi\n\n\n", "3.141592653589793"),
            ("def f():\n    return 4\n\nf()", "4"),
            ("if True:\n    5", ""),
            ("1; 2", "2"),
            ("", ""),
            ("```python\n2 ** 10\n```", "1024"),
            ("import sys\nprint('o')\nsys.stderr.write('e\\n')\nx = 1", "o\ne"),
        ],
    )
    async def test_shown_value(self, sandbox: Sandbox, code: str, text: str) -> None:
        assert await CodeInterpreter(sandbox).call({"code": code}) == ToolResult(text, True)

    async def test_tracebacks(self, sandbox: Sandbox) -> None:
        full = CodeInterpreter(sandbox, ToolOutputRule(max_characters=2000))
        short = CodeInterpreter(sandbox, ToolOutputRule(traceback="last_line"))
        syntax = {"code": "print((1"}
        assert await short.call(syntax) == ToolResult("SyntaxError: '(' was never closed", False)
        assert (await full.call(syntax)).text == (
            "  File \"<code>\", line 1\n    print((1\n         ^\nSyntaxError: '(' was never closed"
        ).replace("         ^", "          ^")
        error = {"code": "print('a')\nx = {}\nx['key']"}
        assert await short.call(error) == ToolResult("a\nKeyError: 'key'", False)
        assert (await full.call(error)).text == (
            'a\nTraceback (most recent call last):\n  File "<code>", line 3, in <module>\n'
            "    x['key']\n    ~^^^^^^^\nKeyError: 'key'"
        )
        chained = {"code": "try:\n    1/0\nexcept Exception:\n    raise ValueError('a\\nb')"}
        assert await short.call(chained) == ToolResult("ValueError: a\nb", False)
        assert "bootstrap" not in (await full.call(chained)).text

    async def test_long_output_is_cut(self, sandbox: Sandbox) -> None:
        result = await CodeInterpreter(sandbox).call({"code": "'x' * 1000"})
        assert result == ToolResult("x" * 128 + "...(truncated)..." + "x" * 128, True)

    async def test_broken_limits_are_told(self, nothing_left_behind: None) -> None:
        limits = SandboxLimits(wall_seconds=0.5, output_bytes=1000)
        async with Sandbox(limits, warm_count=1) as sandbox:
            tool = CodeInterpreter(sandbox, ToolOutputRule(max_characters=4))
            assert await tool.call({"code": "print('ab')\nwhile True: pass"}) == ToolResult(
                "ab\nExecution timed out after 0.5 s.", False
            )
            assert await tool.call({"code": "while True: print('x')"}) == ToolResult(
                "x\n...(truncated)...\nx\nExecution was stopped: it printed more than 1000 bytes.",
                False,
            )
            assert await tool.call({"code": "import os; os._exit(5)"}) == ToolResult(
                "Execution failed with exit code 5.", False
            )

    @pytest.mark.parametrize("arguments", [{}, {"code": 5}, {"code": None}, {"source": "1"}])
    async def test_wrong_arguments(self, sandbox: Sandbox, arguments: dict[str, object]) -> None:
        result = await CodeInterpreter(sandbox).call(arguments)
        assert not result.succeeded
        assert "`code`" in result.text

    async def test_limits_are_not_the_models(self, sandbox: Sandbox) -> None:
        result = await CodeInterpreter(sandbox).call(
            {"code": "1", "timeout": 600, "language": "sh"}
        )
        assert result == ToolResult("1", True)

    async def test_broken_sandbox_is_no_observation(self) -> None:
        with pytest.raises(InfrastructureError):
            await CodeInterpreter(Sandbox()).call({"code": "1"})
