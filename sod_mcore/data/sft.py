"""Conversations for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from sod_mcore.chat import (
    ChatRenderer,
    ChatTemplateError,
    TokenizedConversation,
    tokenize_conversation,
)
from sod_mcore.data.errors import DataError, FieldError, one_line, shortened
from sod_mcore.data.fields import Row, decoded, list_field, messages_field
from sod_mcore.data.rows import JudgedRow, judge_rows, read_rows
from sod_mcore.trajectory import Message

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """A written conversation.

    Attributes:
        messages: as the chat template takes them; an assistant message may say ``"loss": False``.
        tools: schemas of the tools; empty for none.
        enable_thinking: the value the conversation was written for; None if it does not say.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    enable_thinking: bool | None = None


def read_conversations(path: Path | str) -> list[Conversation]:
    """The conversations of a file or data set with columns messages, tools and enable_thinking.

    Only messages is required. Nulls inside messages and tools count as absent; the arguments of a
    tool call may be JSON text.

    Args:
        path: see :func:`sod_mcore.data.row_files.iterate_rows`.

    Raises:
        DataError: the file cannot be read, or rows are malformed (file, row and field are named).
    """
    return read_rows(path, _parse)


def judge_conversations(
    path: Path | str, limit: int | None = None
) -> Iterator[JudgedRow[Conversation]]:
    """As :func:`read_conversations`, row by row, and what is wrong with a row beside it.

    Raises:
        DataError: the file cannot be read at all.
    """
    return judge_rows(path, _parse, limit)


def tokenize_conversations(
    conversations: Sequence[Conversation], renderer: ChatRenderer, max_tokens: int
) -> list[TokenizedConversation]:
    """The conversations as tokens.

    Raises:
        DataError: a conversation is longer than ``max_tokens``, was written for another
            ``enable_thinking`` than the renderer's, or cannot be rendered.
    """
    return [
        tokenize_one(conversation, renderer, max_tokens, f"conversation {number}")
        for number, conversation in enumerate(conversations)
    ]


def tokenize_one(
    conversation: Conversation, renderer: ChatRenderer, max_tokens: int | None, name: str
) -> TokenizedConversation:
    """One conversation as tokens.

    Args:
        conversation: to be rendered.
        renderer: renders it.
        max_tokens: most tokens; None for no limit.
        name: what an error calls the conversation.

    Raises:
        DataError: as :func:`tokenize_conversations`.
    """
    if conversation.enable_thinking not in (None, renderer.enable_thinking):
        raise DataError(
            f"{name} has enable_thinking = {conversation.enable_thinking}, the run has "
            f"chat.enable_thinking = {renderer.enable_thinking}; make them the same"
        )
    try:
        result = tokenize_conversation(renderer, conversation.messages, conversation.tools)
    except (ChatTemplateError, TemplateError) as error:
        raise DataError(f"{name}: {one_line(error)}") from error
    if max_tokens is not None and len(result.token_ids) > max_tokens:
        raise DataError(
            f"{name} has {len(result.token_ids)} tokens, data.max_tokens is {max_tokens}; raise it "
            "or remove the conversation"
        )
    return result


def _parse(number: int, row: Row) -> Conversation:
    messages = messages_field(row, "messages")
    for place, message in enumerate(messages):
        _check_message(message, f"messages[{place}]")
    if messages[-1]["role"] != "assistant":
        raise FieldError("messages", "must end with an assistant message")
    enable_thinking = row.get("enable_thinking")
    if not isinstance(enable_thinking, bool | None):
        raise FieldError("enable_thinking", f"is {enable_thinking!r}; true, false or null")
    return Conversation(tuple(messages), tuple(list_field(row, "tools")), enable_thinking)


def _check_message(message: Message, place: str) -> None:
    """Raises FieldError; arguments that are JSON text become what they say."""
    if message["role"] not in _ROLES:
        problem = f"is {message['role']!r}; one of {', '.join(_ROLES)} is needed"
        raise FieldError(f"{place}.role", problem)
    if not isinstance(message.get("loss", True), bool):
        raise FieldError(f"{place}.loss", f"is {message['loss']!r}; true, false or null")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        problem = f"is {shortened(calls)}; a list of structs, or null, is needed"
        raise FieldError(f"{place}.tool_calls", problem)
    for number, call in enumerate(calls):
        _check_call(call, f"{place}.tool_calls[{number}]")


def _check_call(call: Any, place: str) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        problem = f"is {shortened(call)}; {{type, function: {{name, arguments}}}} is needed"
        raise FieldError(place, problem)
    field = f"{place}.function.arguments"
    arguments = decoded(field, function.get("arguments", {}))
    if not isinstance(arguments, dict):
        problem = f"is {shortened(arguments)}; a struct (or JSON text of one) is needed"
        raise FieldError(field, problem)
    function["arguments"] = arguments
