"""Cuts the text of a conversation out of its Hugging Face chat template.

Three cuts are enough for a rollout: the prompt, one assistant turn, and the block between two
turns. None is written down here; each is the difference of two renderings, so any template whose
renderings extend each other works. History is never rendered again: a template that rewrites
earlier turns (stock Qwen3 drops empty think blocks from all but the last) is asked for each turn
as it stood when it was the last one, because that is what was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sod_mcore.chat.control_tokens import ControlTokens
from sod_mcore.trajectory import Message

_PLACEHOLDER_TURN = "placeholder-turn"
_PLACEHOLDER_CONVERSATION: tuple[Message, ...] = (
    {"role": "user", "content": "placeholder-question"},
    {"role": "assistant", "content": _PLACEHOLDER_TURN},
)


class ChatTemplateError(ValueError):
    """A chat template, or a conversation, that cannot be cut into prompt, turns and blocks."""


class ChatTemplate:
    """The chat template of ``tokenizer`` for one value of ``enable_thinking``.

    All texts that come and go here are hidden (see :class:`ControlTokens`).

    Raises:
        ChatTemplateError: the tokenizer has no template, or its turns end without control token.
    """

    def __init__(
        self, tokenizer: Any, control_tokens: ControlTokens, enable_thinking: bool | None
    ) -> None:
        if not tokenizer.chat_template:
            raise ChatTemplateError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat_template; add "
                "chat_template.jinja to its folder"
            )
        self._tokenizer = tokenizer
        self._control_tokens = control_tokens
        self._options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.end_of_turn = self._find_end_of_turn()

    def prompt(self, messages: Sequence[Message], tools: Sequence[Message] | None) -> str:
        """The conversation so far and the header of the assistant turn that comes next."""
        return self._render(messages, tools, add_generation_prompt=True)

    def turn(self, messages: Sequence[Message], tools: Sequence[Message] | None) -> str:
        """What the model samples to produce the last message: its text and the end of turn.

        Raises:
            ChatTemplateError: the rendered message does not continue the generation prompt.
        """
        before = self.prompt(messages[:-1], tools)
        whole = self._render(messages, tools, add_generation_prompt=False)
        end = whole.find(self.end_of_turn, len(before))
        if not whole.startswith(before) or end < 0:
            raise ChatTemplateError(
                f"message {len(messages) - 1}: the chat template renders it as "
                f"{self._control_tokens.restore(whole[-200:])!r}, which does not continue the "
                f"generation prompt {self._control_tokens.restore(before[-100:])!r}; a turn with "
                "reasoning needs chat.enable_thinking to be true"
            )
        return whole[len(before) : end + len(self.end_of_turn)]

    def block(self, messages: Sequence[Message]) -> str:
        """What stands between a sampled end of turn and the next turn, ``messages`` included.

        Begins with what the template puts after the end of turn (a newline in ChatML) and ends
        with the header of the next assistant turn.
        """
        text = self.prompt([*_PLACEHOLDER_CONVERSATION, *messages], None)
        turn = text.find(_PLACEHOLDER_TURN)
        return text[text.index(self.end_of_turn, turn) + len(self.end_of_turn) :]

    def _find_end_of_turn(self) -> str:
        text = self._render(_PLACEHOLDER_CONVERSATION, None, add_generation_prompt=False)
        turn = text.find(_PLACEHOLDER_TURN)
        end_of_turn = self._control_tokens.first_in(text, turn) if turn >= 0 else None
        if end_of_turn is None:
            raise ChatTemplateError(
                "the chat template ends an assistant turn without a control token; rendered: "
                f"{text[-200:]!r}"
            )
        return end_of_turn

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self._options,
        )
        return text
