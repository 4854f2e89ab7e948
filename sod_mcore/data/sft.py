"""Conversations for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sod_mcore.chat import (
    ChatRenderer,
    ChatTemplateError,
    TokenizedConversation,
    tokenize_conversation,
)
from sod_mcore.data.parquet import DataError, FieldError, list_field, messages_field, read_rows
from sod_mcore.trajectory import Message


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


def read_conversations(path: Path) -> list[Conversation]:
    """The conversations of a Parquet file with columns messages, tools and enable_thinking.

    Only messages is required. Nulls inside messages and tools count as absent.

    Raises:
        DataError: the file cannot be read, or rows are malformed (file, row and field are named).
    """

    def parse(number: int, row: dict[str, Any]) -> Conversation:
        messages = messages_field(row, "messages")
        if messages[-1]["role"] != "assistant":
            raise FieldError("messages", "must end with an assistant message")
        enable_thinking = row.get("enable_thinking")
        if not isinstance(enable_thinking, bool | None):
            raise FieldError("enable_thinking", f"is {enable_thinking!r}; true, false or null")
        return Conversation(tuple(messages), tuple(list_field(row, "tools")), enable_thinking)

    return read_rows(path, parse)


def tokenize_conversations(
    conversations: Sequence[Conversation], renderer: ChatRenderer, max_tokens: int
) -> list[TokenizedConversation]:
    """The conversations as tokens.

    Raises:
        DataError: a conversation is longer than ``max_tokens``, was written for another
            ``enable_thinking`` than the renderer's, or cannot be rendered.
    """
    tokenized: list[TokenizedConversation] = []
    for number, conversation in enumerate(conversations):
        if conversation.enable_thinking not in (None, renderer.enable_thinking):
            raise DataError(
                f"conversation {number} has enable_thinking = {conversation.enable_thinking}, the "
                f"run has chat.enable_thinking = {renderer.enable_thinking}; make them the same"
            )
        try:
            result = tokenize_conversation(renderer, conversation.messages, conversation.tools)
        except ChatTemplateError as error:
            raise DataError(f"conversation {number}: {error}") from error
        if len(result.token_ids) > max_tokens:
            raise DataError(
                f"conversation {number} has {len(result.token_ids)} tokens, data.max_tokens is "
                f"{max_tokens}; raise it or remove the conversation"
            )
        tokenized.append(result)
    return tokenized
