"""Random Qwen3 models of 0.05 M parameters, and Hugging Face's word on what they compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 512
CONTEXT_LENGTH = 512


def save_model(folder: Path, seed: int, *, tied: bool = True) -> Path:
    """Write a Hugging Face folder with random weights and a tokenizer of whole words."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>"])}
    words |= {f"w{index}": index for index in range(len(words), VOCAB_SIZE)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def reference_logprobs(
    folder: Path, token_ids: list[int], temperature: float = 1.0
) -> NDArray[np.float32]:
    """``[T, vocab]``: row t is the distribution of token t given those before it; row 0 is NaN."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1]
    rows: NDArray[np.float32] = torch.log_softmax(logits.double() / temperature, dim=-1).numpy()
    return np.concatenate([np.full((1, rows.shape[1]), np.nan), rows]).astype(np.float32)


def random_ids(length: int, seed: int) -> list[int]:
    """Ids of ordinary tokens."""
    ids: list[int] = np.random.default_rng(seed).integers(4, VOCAB_SIZE, length).tolist()
    return ids
