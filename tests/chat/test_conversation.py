"""Written conversations as tokens: the known faults of the public implementation are absent.

B1: tool headers cut short under templates that treat the last turn differently. B8: loss mask
shifted. B10: no newline between turns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sod_mcore.chat import ChatRenderer, ChatTemplateError, tokenize_conversation
from sod_mcore.trajectory import Message
from tests.chat.chat_tokenizers import (
    HYBRID_TEMPLATE,
    PLAIN_TEMPLATE,
    TOOLS,
    make_tokenizer,
    one_shot_ids,
    two_call_conversation,
)

PLAIN = make_tokenizer(PLAIN_TEMPLATE)
HYBRID = make_tokenizer(HYBRID_TEMPLATE)
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def spans(tokenizer: Any, ids: np.ndarray, mask: np.ndarray) -> list[str]:
    """Texts of the maximal runs in which ``mask`` is set."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in zip(edges[0::2], edges[1::2], strict=True)]


def rollout_ids(renderer: ChatRenderer, messages: list[Message]) -> list[int]:
    """The tokens of a rollout in which the model samples exactly the assistant's messages."""
    ids = renderer.render_prompt(messages[:1], TOOLS).tolist()
    for position, message in enumerate(messages[1:], start=1):
        if message["role"] == "assistant":
            ids += renderer.turn_ids(messages[: position + 1], TOOLS).tolist()
        else:
            ids += renderer.observation_ids(message["content"]).tolist()
    return ids


def test_equals_the_one_shot_rendering() -> None:
    messages = two_call_conversation()
    tokenized = tokenize_conversation(ChatRenderer(PLAIN), messages, TOOLS)
    assert tokenized.token_ids.tolist() == one_shot_ids(PLAIN, messages)


def test_hybrid_template_equals_the_one_shot_rendering_when_every_turn_has_a_thought() -> None:
    messages = two_call_conversation(reasoning_content="Let me see.")
    tokenized = tokenize_conversation(ChatRenderer(HYBRID), messages, TOOLS)
    assert tokenized.token_ids.tolist() == one_shot_ids(HYBRID, messages)


@pytest.mark.parametrize("enable_thinking", [None, True, False])
def test_hybrid_template_keeps_the_think_block_of_every_turn(enable_thinking: bool | None) -> None:
    """One-shot rendering drops the empty block of earlier turns; sampled tokens cannot be dropped.

    So the two agree exactly once the blocks are removed, and every turn carries its block.
    """
    messages = two_call_conversation()
    renderer = ChatRenderer(HYBRID, enable_thinking)
    text = HYBRID.decode(tokenize_conversation(renderer, messages, TOOLS).token_ids)
    whole = HYBRID.decode(one_shot_ids(HYBRID, messages))
    assert (text.count(EMPTY_THOUGHT), whole.count(EMPTY_THOUGHT)) == (3, 1)
    assert text.replace(EMPTY_THOUGHT, "") == whole.replace(EMPTY_THOUGHT, "")


@pytest.mark.parametrize("tokenizer", [PLAIN, HYBRID])
@pytest.mark.parametrize("enable_thinking", [None, False])
def test_equals_a_rollout(tokenizer: Any, enable_thinking: bool | None) -> None:
    messages = two_call_conversation()
    renderer = ChatRenderer(tokenizer, enable_thinking)
    tokenized = tokenize_conversation(renderer, messages, TOOLS)
    assert tokenized.token_ids.tolist() == rollout_ids(renderer, messages)


@pytest.mark.parametrize("tokenizer", [PLAIN, HYBRID])
def test_b1_tool_headers_are_whole_and_b10_turns_are_separated_by_a_newline(
    tokenizer: Any,
) -> None:
    tokenized = tokenize_conversation(ChatRenderer(tokenizer), two_call_conversation(), TOOLS)
    blocks = spans(tokenizer, tokenized.token_ids, ~tokenized.loss_mask)[1:]
    assert len(blocks) == 2
    for block in blocks:
        assert block.startswith("\n<|im_start|>user\n<tool_response>\n")
        assert block.endswith("\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_b8_the_mask_covers_exactly_what_is_sampled() -> None:
    tokenized = tokenize_conversation(ChatRenderer(PLAIN), two_call_conversation(), TOOLS)
    call = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "%s"}}\n</tool_call>'
    assert spans(PLAIN, tokenized.token_ids, tokenized.loss_mask) == [
        call % "print(57 + 87" + "<|im_end|>",
        "Again:\n" + call % "print(57 + 87)" + "<|im_end|>",
        "\\boxed{144}<|im_end|>",
    ]


def test_hybrid_thought_is_sampled_or_given_as_the_template_says() -> None:
    messages = two_call_conversation()
    sampled = tokenize_conversation(ChatRenderer(HYBRID), messages, TOOLS)
    given = tokenize_conversation(ChatRenderer(HYBRID, enable_thinking=False), messages, TOOLS)
    assert sampled.token_ids.tolist() == given.token_ids.tolist()
    for text in spans(HYBRID, sampled.token_ids, sampled.loss_mask):
        assert text.startswith(EMPTY_THOUGHT)
    for text in spans(HYBRID, given.token_ids, given.loss_mask):
        assert "<think>" not in text


def test_turning_the_loss_of_a_turn_off_leaves_tokens_and_turns() -> None:
    messages = two_call_conversation()
    renderer = ChatRenderer(PLAIN)
    whole = tokenize_conversation(renderer, messages, TOOLS)
    muted = tokenize_conversation(
        renderer, [messages[0], {**messages[1], "loss": False}, *messages[2:]], TOOLS
    )
    assert np.array_equal(whole.token_ids, muted.token_ids)
    assert np.array_equal(whole.turn_index, muted.turn_index)
    assert np.array_equal(muted.loss_mask, whole.loss_mask & (whole.turn_index != 0))


def test_types_and_turn_index() -> None:
    tokenized = tokenize_conversation(ChatRenderer(PLAIN), two_call_conversation(), TOOLS)
    assert tokenized.token_ids.dtype == np.int32
    assert tokenized.loss_mask.dtype == np.bool_
    assert tokenized.turn_index.dtype == np.int16
    assert np.array_equal(tokenized.loss_mask, tokenized.turn_index >= 0)
    assert sorted(set(tokenized.turn_index.tolist())) == [-1, 0, 1, 2]


def test_tools_running_in_one_block_equal_the_one_shot_rendering() -> None:
    messages = two_call_conversation()
    messages.insert(3, {"role": "tool", "content": "second answer"})
    tokenized = tokenize_conversation(ChatRenderer(PLAIN), messages, TOOLS)
    assert tokenized.token_ids.tolist() == one_shot_ids(PLAIN, messages)


@pytest.mark.parametrize("end", [1, 3])
def test_a_conversation_must_end_with_the_assistant(end: int) -> None:
    with pytest.raises(ChatTemplateError, match="last message must be the assistant's"):
        tokenize_conversation(ChatRenderer(PLAIN), two_call_conversation()[:end], TOOLS)
