"""Measures prompts as the rollout renders them, tool schemas included, and sorts out long ones.

The reference measures without the schemas, about 150 tokens too few; prompts in between then crash
it (sod: B12).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from sod_mcore.chat import ChatRenderer
from sod_mcore.data.errors import DataError, one_line
from sod_mcore.trajectory import Prompt


class LongPrompt(NamedTuple):
    """A prompt of more tokens than are allowed."""

    prompt: Prompt
    num_tokens: int


def prompt_length(
    prompt: Prompt, renderer: ChatRenderer, tool_schemas: Sequence[dict[str, Any]]
) -> int:
    """Tokens of the rendered prompt, the header of the first turn included.

    Raises:
        DataError: the chat template refuses the prompt's messages.
    """
    try:
        return len(renderer.render_prompt(prompt.messages, tool_schemas))
    except TemplateError as error:
        roles = [message["role"] for message in prompt.messages]
        raise DataError(
            f"{prompt.prompt_id}: the chat template refuses messages of the roles {roles}: "
            f"{one_line(error)}"
        ) from error


def split_by_length(
    prompts: Sequence[Prompt],
    renderer: ChatRenderer,
    tool_schemas: Sequence[dict[str, Any]],
    max_tokens: int,
) -> tuple[list[Prompt], list[LongPrompt]]:
    """The prompts of at most ``max_tokens`` tokens, and the longer ones, both in their order.

    Raises:
        DataError: the chat template refuses the messages of a prompt.
    """
    kept: list[Prompt] = []
    too_long: list[LongPrompt] = []
    for prompt in prompts:
        num_tokens = prompt_length(prompt, renderer, tool_schemas)
        if num_tokens <= max_tokens:
            kept.append(prompt)
        else:
            too_long.append(LongPrompt(prompt, num_tokens))
    return kept, too_long
