"""Weights of a few numbers, and the folder that engines of them were started from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sod_mcore.serving.weights.tensor_check import Bucket

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def write_folder(folder: Path, *, tied: bool) -> Path:
    """What the engines were started from; some tied models store the output layer nevertheless."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    tensors = {EMBEDDING: torch.zeros(5, 3), HEAD: torch.zeros(5, 3)}
    save_file(tensors, folder / "model-00001-of-00002.safetensors")
    save_file({NORM: torch.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    return folder


def new_buckets(dtype: torch.dtype = torch.float32) -> list[Bucket]:
    """Two buckets; the first one's tensor is a slice of a larger one."""
    generator = torch.Generator().manual_seed(0)
    padded = torch.randn(4000, 3, generator=generator).to(dtype)
    return [[(EMBEDDING, padded[:5])], [(NORM, torch.tensor([1, 2.5, -3], dtype=dtype))]]


def opened(handle: int, values: list[int]) -> torch.Tensor:
    """Stands for what opens a handle of memory: the bytes come with it, and ``handle`` tells one
    from another."""
    return torch.tensor(values, dtype=torch.uint8)
