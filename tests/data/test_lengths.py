"""Prompts are measured with the tool schemas, exactly at the limit too."""

from __future__ import annotations

import pytest

from sod_mcore.chat import ChatRenderer
from sod_mcore.data import DataError, split_by_length
from sod_mcore.trajectory import Prompt
from tests.chat.chat_tokenizers import PLAIN_TEMPLATE, TOOLS, make_tokenizer, one_shot_ids


def prompt(words: int, role: str = "user") -> Prompt:
    messages = ({"role": role, "content": "Calculate " * words},)
    return Prompt(messages, "", "", f"set/{words}")


def test_the_schema_decides_which_prompts_are_too_long() -> None:
    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    renderer = ChatRenderer(tokenizer)
    prompts = [prompt(words) for words in (9, 2, 5)]
    lengths = [
        len(one_shot_ids(tokenizer, list(p.messages), add_generation_prompt=True)) + 1
        for p in prompts
    ]  # the helper cuts the line break after the header
    kept, too_long = split_by_length(prompts, renderer, TOOLS, lengths[2])
    assert kept == [prompts[1], prompts[2]]
    assert too_long == [(prompts[0], lengths[0])]
    assert split_by_length(prompts, renderer, TOOLS, lengths[2] - 1)[0] == [prompts[1]]
    assert split_by_length(prompts, renderer, [], lengths[2] - 1) == (prompts, [])


def test_a_prompt_that_the_template_refuses_is_named() -> None:
    template = "{{ raise_exception('no system role') if messages[0].role == 'system' }}"
    renderer = ChatRenderer(make_tokenizer(template + PLAIN_TEMPLATE))
    with pytest.raises(DataError, match=r"set/1: the chat template refuses .*no system role"):
        split_by_length([prompt(1, "system")], renderer, TOOLS, 100)
