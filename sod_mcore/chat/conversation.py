"""Turns a written conversation into the tokens that a rollout of it would have had.

Supervised fine-tuning must teach exactly what is sampled later, so the sequence is put together
from the same three pieces as a rollout: prompt, sampled turns, observation blocks. Rendering the
conversation message by message and cutting at character offsets, as is often done, loses part of
every tool message under templates that treat the last turn differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sod_mcore.chat.renderer import ChatRenderer
from sod_mcore.chat.template import ChatTemplateError
from sod_mcore.trajectory import Message


class TokenizedConversation(NamedTuple):
    """A conversation of ``T`` tokens.

    Attributes:
        token_ids: int32 ``[T]``; ends with the end of the last assistant turn.
        loss_mask: bool ``[T]``; True on what the model samples (end of turn included), except in
            turns whose message says ``"loss": false``.
        turn_index: int16 ``[T]``; 0, 1, ... in assistant turns, -1 elsewhere. Turning a turn's
            loss off does not change it.
    """

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    turn_index: NDArray[np.int16]


def tokenize_conversation(
    renderer: ChatRenderer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
) -> TokenizedConversation:
    """The tokens, loss mask and turns of ``messages``, which end with an assistant turn.

    Raises:
        ChatTemplateError: there is no assistant turn, the last message is not one, or a turn
            cannot follow the template's generation prompt.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[-1] != len(messages) - 1:
        roles = [message["role"] for message in messages]
        raise ChatTemplateError(f"the roles are {roles}; the last message must be the assistant's")
    token_ids = [renderer.render_prompt(messages[: turns[0]], tools)]
    turn_index = [np.full(len(token_ids[0]), -1)]
    loss_mask = [np.zeros(len(token_ids[0]), dtype=bool)]
    for number, position in enumerate(turns):
        if number > 0:
            block = renderer.block_ids(messages[turns[number - 1] + 1 : position])
            token_ids.append(block)
            turn_index.append(np.full(len(block), -1))
            loss_mask.append(np.zeros(len(block), dtype=bool))
        turn = renderer.turn_ids(messages[: position + 1], tools)
        token_ids.append(turn)
        turn_index.append(np.full(len(turn), number))
        loss_mask.append(np.full(len(turn), messages[position].get("loss") is not False))
    return TokenizedConversation(
        np.concatenate(token_ids).astype(np.int32),
        np.concatenate(loss_mask),
        np.concatenate(turn_index).astype(np.int16),
    )
