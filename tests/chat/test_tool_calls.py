"""Hermes tool-call parsing: what is a call, what is a final answer, what the model is told."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sod_mcore.chat import ParsedTurn, ToolCall, parse_tool_calls

GOOD = '{"name": "code_interpreter", "arguments": {"code": "print(1)"}}'
CALL = ToolCall("code_interpreter", {"code": "print(1)"})


def wrap(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


@pytest.mark.parametrize("text", ["", "\\boxed{3}", "I call <tool> no tool", "<think>x</think>3"])
def test_a_turn_without_markers_is_a_final_answer(text: str) -> None:
    assert parse_tool_calls(text) == ParsedTurn((), None)


def test_calls_are_read_in_order() -> None:
    other = '{"name": "search", "arguments": {"query": "x", "limit": 3}}'
    parsed = parse_tool_calls(f"First.\n{wrap(GOOD)}\n{wrap(other)}")
    assert parsed == ParsedTurn((CALL, ToolCall("search", {"query": "x", "limit": 3})), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (wrap('{"name": "code_interpreter", "arguments": {"code": "print(1)"}'), "invalid JSON"),
        (wrap(GOOD + "}"), "text after the JSON object: '}"),
        (wrap('{"name": "c", "arguments": {"code": "a\nb"}}'), r"line breaks inside strings as \n"),
        (wrap("print(1)"), "invalid JSON"),
        (wrap(""), "invalid JSON"),
        (f"<tool_call>\n{GOOD}", "not closed by </tool_call>"),
        (f"{GOOD}\n</tool_call>", "</tool_call> without <tool_call>"),
        (wrap('["code_interpreter"]'), 'no "name"'),
        (wrap('{"arguments": {}}'), 'no "name"'),
        (wrap('{"name": "c"}'), '"arguments" is not a JSON object'),
        (wrap('{"name": "c", "arguments": "print(1)"}'), '"arguments" is not a JSON object'),
        (wrap('{"name": "c", "arguments": {"code": "\\ud800"}}'), "surrogate"),
        (wrap('{"name": "c", "arguments": {"n": ' + "1" * 5000 + "}}"), "too many digits"),
        (wrap('{"name": "c", "arguments": ' + "[" * 100_000), "nested too deeply"),
    ],
)
def test_an_unreadable_call_is_explained(text: str, message: str) -> None:
    parsed = parse_tool_calls(text)
    assert parsed.calls == ()
    assert parsed.malformed is not None
    assert parsed.malformed.startswith("Error: malformed tool call: ")
    assert message in parsed.malformed


@pytest.mark.parametrize("text", [wrap("{") + wrap(GOOD), wrap(GOOD) + wrap("{")])
def test_a_readable_call_beside_an_unreadable_one_is_kept(text: str) -> None:
    parsed = parse_tool_calls(text)
    assert parsed.calls == (CALL,)
    assert parsed.malformed is not None


def test_unknown_tools_and_arguments_are_left_to_the_tools() -> None:
    parsed = parse_tool_calls(wrap('{"name": "rm", "arguments": {}}'))
    assert parsed == ParsedTurn((ToolCall("rm", {}),), None)


def test_a_call_that_was_only_thought_of_is_not_made() -> None:
    assert parse_tool_calls(f"<think>{wrap(GOOD)}</think>\n\n3").calls == ()
    assert parse_tool_calls(f"<think>hm</think>{wrap(GOOD)}").calls == (CALL,)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "</think>", '"', "\n", "x", "{"])).map(
        "".join
    )
)
def test_a_program_may_contain_the_markers(code: str) -> None:
    body = json.dumps({"name": "code_interpreter", "arguments": {"code": code}})
    assert parse_tool_calls(wrap(body)).calls == (ToolCall("code_interpreter", {"code": code}),)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<think>", GOOD, "{", "\n", "x"])).map(
        "".join
    )
)
def test_any_text_is_parsed(text: str) -> None:
    parsed = parse_tool_calls(text)
    assert parsed.malformed is None or parsed.malformed.startswith("Error: ")
