"""Draws tokens for people: what is sampled and trained in colour, control tokens dim, turns named.

Without colour, what the loss counts stands between « and ».
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sod_mcore.chat import TokenizedConversation

_LOSS, _DIM, _TURN, _RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[7m", "\x1b[0m"
# Text of a data set must not steer the terminal; only line breaks and tabs go through.
_TERMINAL_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class _Run:
    """Neighbouring tokens that look the same; decoded together, since one character may be many."""

    token_ids: list[int]
    has_loss: bool
    is_dim: bool
    turn: int


def draw_tokens(tokens: TokenizedConversation, tokenizer: Any, *, color: bool) -> str:
    """``tokens`` as text for a terminal.

    Args:
        tokens: a conversation, or a prompt, of which no token has a turn.
        tokenizer: the Hugging Face tokenizer that decodes them.
        color: use ANSI sequences.
    """
    parts: list[str] = []
    turn = -1
    dim = frozenset(tokenizer.added_tokens_decoder) if color else frozenset()
    for run in _runs(tokens, dim):
        if run.turn != turn and run.turn >= 0:
            parts.append(_turn_mark(run, color))
        turn = run.turn
        parts.append(_styled(run, _plain_text(tokenizer, run.token_ids), color))
    return "".join(parts)


def summary(tokens: TokenizedConversation) -> str:
    """Numbers of tokens, of tokens in the loss, and of turns, in a line."""
    num_turns = int(tokens.turn_index.max(initial=-1)) + 1
    return (
        f"{len(tokens.token_ids)} tokens, {int(tokens.loss_mask.sum())} of them in the loss; "
        f"assistant turns: {num_turns}"
    )


def _runs(tokens: TokenizedConversation, dim: frozenset[int]) -> Iterator[_Run]:
    looks = [
        (int(token), bool(has_loss), int(token) in dim, int(turn))
        for token, has_loss, turn in zip(*tokens, strict=True)
    ]
    for look, group in itertools.groupby(looks, key=lambda item: item[1:]):
        yield _Run([item[0] for item in group], *look)


def _plain_text(tokenizer: Any, token_ids: list[int]) -> str:
    text: str = tokenizer.decode(
        token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return _TERMINAL_CONTROL.sub(lambda match: repr(match.group())[1:-1], text)


def _turn_mark(run: _Run, color: bool) -> str:
    mark = f"[turn {run.turn}{'' if run.has_loss else ', no loss'}]"
    return f"{_TURN}{mark}{_RESET}" if color else mark


def _styled(run: _Run, text: str, color: bool) -> str:
    if not color:
        return f"«{text}»" if run.has_loss else text
    style = (_LOSS if run.has_loss else "") + (_DIM if run.is_dim else "")
    if not style:
        return text
    # Pagers forget the style at the end of a line.
    return "\n".join(f"{style}{line}{_RESET}" if line else "" for line in text.split("\n"))
