"""Random Hugging Face models of each family, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LLAMA_3_FACTORS = {"llama_3_1": 8.0, "llama_3_2": 32.0}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NAMES = (
    "llama_tied",
    "llama_untied",
    "llama_3_2",
    "qwen2_tied",
    "qwen2_untied",
    "qwen3_tied",
    "qwen3_untied",
)
LAYOUTS = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2))
"""(tensor, pipeline); of four ranks, those left over are replicas, which must not be in the way."""
TOKENS = torch.randint(0, 120, (2, 48), generator=torch.Generator().manual_seed(1))
"""``[batch, length]``, ids of every model."""


def write_models(folder: Path) -> None:
    """Write ``folder/<name>`` for each of :data:`NAMES`.

    Every vocabulary needs padding; at tensor-parallel size 4 the last ranks hold no real row of the
    smaller one. ``llama_3_2`` scales its rotary frequencies and has heads of a width of their own.
    """
    torch.manual_seed(0)
    for name in NAMES:
        is_tied = not name.endswith("untied")
        model = make_model(name, vocab_size=300 if is_tied else 120, tie_word_embeddings=is_tied)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases: not the neutral values they start with
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)


def make_model(name: str, **changes: Any) -> Any:
    """A model with shapes that tensor parallelism 4 and pipeline parallelism 4 divide."""
    shapes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
        **changes,
    }
    if name in LLAMA_3_FACTORS:
        rope = {**LLAMA_3_ROPE, "factor": LLAMA_3_FACTORS[name]}
        shapes |= {"rope_parameters": rope, "head_dim": 16}
    if name.startswith("llama"):
        return LlamaForCausalLM(LlamaConfig(**shapes))
    if name.startswith("qwen2"):
        return Qwen2ForCausalLM(Qwen2Config(**shapes))
    return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **shapes))
