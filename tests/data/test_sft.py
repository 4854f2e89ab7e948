"""SFT files: Parquet's nulls do not reach the chat template; bad conversations are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sod_mcore.chat import ChatRenderer, tokenize_conversation
from sod_mcore.data import Conversation, DataError, read_conversations, tokenize_conversations
from tests.chat.chat_tokenizers import (
    HYBRID_TEMPLATE,
    PLAIN_TEMPLATE,
    TOOLS,
    make_tokenizer,
    two_call_conversation,
)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_conversations_survive_parquet(tmp_path: Path) -> None:
    messages = two_call_conversation()
    messages[1]["loss"] = False
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows: list[dict[str, Any]] = [
        {"messages": messages, "tools": TOOLS},
        {"messages": plain, "tools": None},
    ]
    conversations = read_conversations(write(tmp_path / "sft.parquet", rows))
    assert conversations == [
        Conversation(tuple(messages), tuple(TOOLS)),
        Conversation(tuple(plain), ()),
    ]
    renderer = ChatRenderer(make_tokenizer(PLAIN_TEMPLATE))
    expected = tokenize_conversation(renderer, messages, TOOLS)
    tokenized = tokenize_conversations(conversations, renderer, max_tokens=1000)[0]
    for found, wanted in zip(tokenized, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def with_call(arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "code_interpreter", "arguments": arguments}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    return [{"role": "user", "content": "a"}, call, {"role": "assistant", "content": "b"}]


def test_arguments_may_be_json_text(tmp_path: Path) -> None:
    rows = [{"messages": with_call(value)} for value in ('{"code": "1", "n": null}', {"code": "1"})]
    path = tmp_path / "sft.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    calls = [c.messages[1]["tool_calls"][0] for c in read_conversations(path)]
    assert [call["function"]["arguments"] for call in calls] == [
        {"code": "1", "n": None},
        {"code": "1"},
    ]


def answering(**changes: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **changes}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "must end with an assistant"),
        ({"messages": []}, "messages: is empty"),
        (
            {"messages": [{"role": "user", "content": None}, *answering()[1:]]},
            r"messages\[0\].content: is empty; write what the user asks",
        ),
        ({"messages": answering(), "enable_thinking": 1}, "enable_thinking: is 1"),
        ({"messages": answering(), "tools": "3"}, "tools: is 3; a list of structs"),
        ({"messages": answering(loss="no")}, r"messages\[1\].loss: is 'no'; true"),
        ({"messages": answering(tool_calls=3)}, r"messages\[1\].tool_calls: is 3; a list"),
        ({"messages": answering(role="bot")}, r"messages\[1\].role: is 'bot'; one of system, user"),
        (
            {"messages": with_call("{code")},
            r"tool_calls\[0\].function.arguments: is '{code'; a str",
        ),
        ({"messages": with_call("[1]")}, r"tool_calls\[0\].function.arguments: is \[1\]; a struct"),
        ({"messages": answering(tool_calls=[{"code": "1"}])}, r"tool_calls\[0\]: is {'code': '1'}"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"bad\.parquet, row 0, .*{message}"):
        read_conversations(write(tmp_path / "bad.parquet", [row]))


def test_a_conversation_for_another_thinking_mode_is_refused() -> None:
    renderer = ChatRenderer(make_tokenizer(HYBRID_TEMPLATE), enable_thinking=False)
    messages = tuple(two_call_conversation())
    agreeing = [Conversation(messages), Conversation(messages, (), False)]
    assert len(tokenize_conversations(agreeing, renderer, 1000)) == 2
    with pytest.raises(DataError, match=r"conversation 1 has enable_thinking = True"):
        tokenize_conversations([*agreeing[:1], Conversation(messages, (), True)], renderer, 1000)


def test_a_conversation_that_is_too_long_or_cannot_be_rendered_is_named() -> None:
    renderer = ChatRenderer(make_tokenizer(HYBRID_TEMPLATE), enable_thinking=False)
    messages = tuple(two_call_conversation())
    with pytest.raises(DataError, match=r"conversation 0 has \d+ tokens, data.max_tokens is 10"):
        tokenize_conversations([Conversation(messages)], renderer, 10)
    thoughtful = tuple(two_call_conversation(reasoning_content="hm"))
    with pytest.raises(DataError, match=r"conversation 0: .*chat\.enable_thinking"):
        tokenize_conversations([Conversation(thoughtful)], renderer, 1000)
