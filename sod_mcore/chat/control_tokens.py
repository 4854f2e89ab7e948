"""Keeps text that only looks like control tokens from becoming control tokens.

A program may print ``<|im_end|>``; a user may type ``</tool_response>``. Chat templates paste such
text between their own control tokens, and tokenizers cannot tell the two apart. Here content is
hidden before the template runs (each control token in it becomes an escape sequence), and is put
back afterwards as plain text, so that only what the template wrote becomes a control token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sod_mcore.trajectory import Message

_ESCAPE = "\U0010fffd"
_FIRST_CODE = 0x100000
_ESCAPED = re.compile(f"{_ESCAPE}(.)", re.DOTALL)


class ControlTokens:
    """The control tokens of one tokenizer: hides them in content, encodes rendered text.

    Args:
        tokenizer: a fast Hugging Face tokenizer. Its "special" added tokens (end of turn and the
            like) delimit turns; its other added tokens (``<think>``, ``<tool_call>``) are markup.

    Raises:
        ValueError: the tokenizer is not a fast one, or has a control token that swallows blanks.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer is a {type(tokenizer).__name__}; a fast tokenizer (tokenizer.json) is "
                "needed"
            )
        added = tokenizer.added_tokens_decoder
        for token in added.values():
            if token.lstrip or token.rstrip or token.single_word:
                raise ValueError(
                    f"control token {token.content!r} has lstrip, rstrip or single_word set; such "
                    "tokens change the text around them and cannot be kept apart from content"
                )
        self.ids: Mapping[str, int] = {token.content: index for index, token in added.items()}
        self._delimiters = {token.content for token in added.values() if token.special}
        self._any = _alternatives(self.ids)
        self._any_or_escape = _alternatives([*self.ids, _ESCAPE])
        self._delimiter_or_escape = _alternatives([*self._delimiters, _ESCAPE])
        self._names = sorted(self.ids)
        self._codes = {name: chr(_FIRST_CODE + i) for i, name in enumerate(self._names)}
        self._plain = _without_added_tokens(tokenizer)

    def hide(self, message: Message) -> Message:
        """The message with control tokens in its content replaced by escape sequences.

        Everything is hidden in what the model did not write, and in the arguments of its tool
        calls. Its own text keeps markup (``<think>``), which it sampled as such; tokens that
        delimit turns are hidden there too, because sampling one would have ended the turn.
        """
        if message["role"] != "assistant":
            return _map_strings(message, self._hide_any)
        hidden = {
            key: self._hide_delimiters(value) if isinstance(value, str) else value
            for key, value in message.items()
        }
        if hidden.get("tool_calls"):
            hidden["tool_calls"] = _map_strings(hidden["tool_calls"], self._hide_any)
        return hidden

    def restore(self, text: str) -> str:
        """Undo :meth:`hide` in rendered text."""
        return _ESCAPED.sub(self._original, text)

    def first_in(self, text: str, start: int) -> str | None:
        """The first control token at or after ``start``, or None."""
        match = self._any.search(text, start)
        return match.group() if match else None

    def encode(self, rendered: str) -> NDArray[np.int32]:
        """Token ids int32 ``[T]`` of rendered text whose content was hidden.

        Each stretch between two control tokens is encoded as a whole, as the tokenizer itself
        does, so that ordinary text gets the ids of a plain ``tokenizer(text)``.
        """
        pieces = self._any.split(rendered)
        stretches = [self.restore(piece) for piece in pieces[0::2]]
        encoded = self._plain.encode_batch(stretches, add_special_tokens=False)
        ids: list[int] = list(encoded[0].ids)
        for control, stretch in zip(pieces[1::2], encoded[1:], strict=True):
            ids.append(self.ids[control])
            ids.extend(stretch.ids)
        return np.array(ids, dtype=np.int32)

    def _hide_any(self, text: str) -> str:
        return self._any_or_escape.sub(self._escaped, text)

    def _hide_delimiters(self, text: str) -> str:
        return self._delimiter_or_escape.sub(self._escaped, text)

    def _escaped(self, match: re.Match[str]) -> str:
        return _ESCAPE + self._codes.get(match.group(), _ESCAPE)

    def _original(self, match: re.Match[str]) -> str:
        code = match.group(1)
        return _ESCAPE if code == _ESCAPE else self._names[ord(code) - _FIRST_CODE]


def _alternatives(tokens: Any) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _without_added_tokens(tokenizer: Any) -> Tokenizer:
    """The same tokenizer, blind to control tokens and adding none."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(definition))


def _map_strings(value: Any, change: Any) -> Any:
    """``value`` with ``change`` applied to every string in it but keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value
