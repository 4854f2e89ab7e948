"""A tiny model that answers sums without a tool, and is often wrong: something to measure.

The committed teacher of the arithmetic example, fine-tuned for a minute to write the result itself.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sod_mcore.chat import ChatRenderer

TEACHER = Path(__file__).parents[1] / "examples" / "arithmetic" / "teacher"
LARGEST_SUMMAND = 12
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
IGNORED = -100


def question(first: int, second: int) -> str:
    """What the model is asked."""
    return f"Calculate {first} + {second}."


def write_sums_model(folder: Path, updates: int) -> Path:
    """Fine-tune and write a Hugging Face folder; more updates make a better model."""
    torch.manual_seed(1)
    rng = random.Random(2)
    model: Any = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(TEACHER)
    renderer = ChatRenderer.from_folder(TEACHER)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    for update in range(updates):
        ids, labels = _batch(renderer, tokenizer, rng)
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if update % 50 == 0:
            print(f"update {update} of {updates}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _batch(
    renderer: ChatRenderer, tokenizer: Any, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels ``[B, T]``, padded on the right; only the answer carries loss."""
    rows = []
    for _ in range(BATCH_SIZE):
        summands = rng.randint(0, LARGEST_SUMMAND), rng.randint(0, LARGEST_SUMMAND)
        prompt = renderer.render_prompt([{"role": "user", "content": question(*summands)}], [])
        text = f"\\boxed{{{sum(summands)}}}{tokenizer.eos_token}"
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append((prompt.tolist(), answer))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels
