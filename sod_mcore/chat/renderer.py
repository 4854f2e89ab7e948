"""The one way a conversation becomes tokens, for SFT, rollout, teacher and evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from sod_mcore.chat.control_tokens import ControlTokens
from sod_mcore.chat.template import ChatTemplate
from sod_mcore.trajectory import Message

TokenIds = NDArray[np.int32]


class ChatRenderer:
    """Prompts, turns and observations as token ids.

    A rollout is ``render_prompt``, then alternately a sampled turn (up to and including
    ``end_of_turn_id``) and ``observation_ids``. For a template that does not rewrite history the
    concatenation is the one-shot rendering of the conversation, but for the final newline.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        enable_thinking: passed to the template; None leaves the template's default.
    """

    def __init__(self, tokenizer: Any, enable_thinking: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self.enable_thinking = enable_thinking
        self._control_tokens = ControlTokens(tokenizer)
        self._template = ChatTemplate(tokenizer, self._control_tokens, enable_thinking)
        self.end_of_turn_id: int = self._control_tokens.ids[self._template.end_of_turn]

    @classmethod
    def from_folder(cls, folder: str | Path, enable_thinking: bool | None = None) -> ChatRenderer:
        """A renderer for the tokenizer in a Hugging Face folder; no network is used."""
        return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True), enable_thinking)

    def render_prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> TokenIds:
        """Token ids int32 ``[T]`` of the conversation so far and the next assistant header."""
        return self._control_tokens.encode(self._template.prompt(self._hidden(messages), tools))

    def observation_ids(self, tool_text: str) -> TokenIds:
        """Token ids int32 ``[T]`` of what follows a sampled end of turn: a tool's answer.

        The block begins with the newline that the template puts after the end of turn and ends
        with the next assistant header, so ``ids + turn + block`` is what the engine sees next.
        """
        return self.block_ids([{"role": "tool", "content": tool_text}])

    def block_ids(self, messages: Sequence[Message]) -> TokenIds:
        """As :meth:`observation_ids`, for any messages between two assistant turns."""
        return self._control_tokens.encode(self._template.block(self._hidden(messages)))

    def turn_ids(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> TokenIds:
        """Token ids int32 ``[T]`` that a model samples to write the last of ``messages``.

        Raises:
            ChatTemplateError: the message cannot follow the generation prompt.
        """
        return self._control_tokens.encode(self._template.turn(self._hidden(messages), tools))

    def turn_text(self, token_ids: Sequence[int] | TokenIds) -> str:
        """Text of a sampled turn, markup kept, end of turn removed; what a parser reads."""
        ids = [int(token) for token in token_ids]
        if ids and ids[-1] == self.end_of_turn_id:
            ids.pop()
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _hidden(self, messages: Sequence[Message]) -> list[Message]:
        return [self._control_tokens.hide(message) for message in messages]
