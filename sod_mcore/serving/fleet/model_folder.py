"""What a Hugging Face folder says about its model before any engine has loaded it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sod_mcore.config import ConfigError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ModelFolder:
    """The facts that a launch needs.

    Attributes:
        path: the folder.
        vocab_size: rows of the embedding.
        context_length: positions that the model was made for.
        key_value_numbers: numbers that the key-value cache holds for one token, over all layers.
        dtype: precision of the stored weights, as "float32" or "bfloat16".
        has_tokenizer: whether a tokenizer lies beside the weights.
        scales_positions: whether a scaling of the rotary embedding takes it beyond
            ``context_length``.
    """

    path: Path
    vocab_size: int
    context_length: int
    key_value_numbers: int
    dtype: str
    has_tokenizer: bool
    scales_positions: bool = False


def read_model_folder(field: str, path: Path) -> ModelFolder:
    """Read ``config.json`` of a Hugging Face folder; ``field`` names the setting in errors.

    Raises:
        ConfigError: the folder holds no model, or one that this package cannot serve.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{field} is {str(path)!r}, which has no config.json; give a Hugging Face folder"
        )
    outer: dict[str, Any] = json.loads(file.read_text())
    tree = outer.get("text_config", outer)
    try:
        heads = tree["num_attention_heads"]
        head_size = tree.get("head_dim") or tree["hidden_size"] // heads
        key_value_heads = tree.get("num_key_value_heads") or heads
        return ModelFolder(
            path=path,
            vocab_size=tree["vocab_size"],
            context_length=tree["max_position_embeddings"],
            key_value_numbers=2 * tree["num_hidden_layers"] * key_value_heads * head_size,
            dtype=str(tree.get("dtype") or tree.get("torch_dtype") or outer.get("dtype")),
            has_tokenizer=any((path / name).is_file() for name in TOKENIZER_FILES),
            scales_positions=bool(tree.get("rope_scaling")),
        )
    except KeyError as error:
        raise ConfigError(
            f"{field} is {str(path)!r}, whose config.json lacks {error}; only decoder models with "
            "ordinary attention are served"
        ) from error
