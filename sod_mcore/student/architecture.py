"""The shape of a model, read from the ``config.json`` of a Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sod_mcore.config import ConfigError

SUPPORTED = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")


@dataclass(frozen=True)
class Architecture:
    """What the weights' shapes and the forward pass depend on; names follow Megatron-Core.

    Attributes:
        num_query_groups: number of key-value heads.
        kv_channels: width of one attention head.
        qk_layernorm: RMSNorm on each head's query and key (Qwen3).
        add_qkv_bias: bias of the query, key and value projections (Qwen2).
        rope_scaling_factor: by how much Llama 3.1 stretches low rotary frequencies; None: not.
    """

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    tie_word_embeddings: bool
    qk_layernorm: bool
    add_qkv_bias: bool
    rope_scaling_factor: float | None = None


def read_architecture(model_path: str | Path, *, field: str = "student.model_path") -> Architecture:
    """Read ``config.json`` of a Hugging Face folder.

    Args:
        field: what the folder is called in messages.

    Raises:
        ConfigError: no such file, or a model that this package cannot build.
    """
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{field} is {str(model_path)!r}: {path} does not exist; give a Hugging Face folder "
            "with config.json and *.safetensors"
        )
    values: dict[str, Any] = json.loads(path.read_text())
    name = (values.get("architectures") or ["none"])[0]
    if name not in SUPPORTED:
        raise ConfigError(
            f"{field}: {path} says architecture {name}; supported: {', '.join(SUPPORTED)}"
        )
    _refuse_unsupported(f"{field}: {path}", values)
    heads = int(values["num_attention_heads"])
    return Architecture(
        name=name,
        num_layers=int(values["num_hidden_layers"]),
        hidden_size=int(values["hidden_size"]),
        ffn_hidden_size=int(values["intermediate_size"]),
        num_attention_heads=heads,
        num_query_groups=int(values.get("num_key_value_heads") or heads),
        kv_channels=int(values.get("head_dim") or values["hidden_size"] // heads),
        vocab_size=int(values["vocab_size"]),
        max_position_embeddings=int(values["max_position_embeddings"]),
        layernorm_epsilon=float(values["rms_norm_eps"]),
        rotary_base=float(_rope(values).get("rope_theta", 10000.0)),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        qk_layernorm=name == "Qwen3ForCausalLM",
        add_qkv_bias=name == "Qwen2ForCausalLM",
        rope_scaling_factor=_rope_scaling_factor(values),
    )


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters from ``rope_parameters`` (transformers 5) or the top level (before)."""
    older = {"rope_theta": values.get("rope_theta", 10000.0), **(values.get("rope_scaling") or {})}
    return {**older, **(values.get("rope_parameters") or {})}


def _rope_type(values: dict[str, Any]) -> str:
    rope = _rope(values)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_scaling_factor(values: dict[str, Any]) -> float | None:
    return float(_rope(values)["factor"]) if _rope_type(values) == "llama3" else None


def _refuse_unsupported(where: str, values: dict[str, Any]) -> None:
    rope = _rope(values)
    required: dict[str, tuple[Any, Any]] = {
        "hidden_act": (values.get("hidden_act", "silu"), "silu"),
        "use_sliding_window": (values.get("use_sliding_window", False), False),
        "mlp_bias": (values.get("mlp_bias", False), False),
        "attention_bias": (values.get("attention_bias", False), False),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        "quantization_config.quant_method": (
            (values.get("quantization_config") or {}).get("quant_method"),
            None,
        ),
    }
    if _rope_type(values) == "llama3":
        # Megatron-Core's own constants; only the factor is an argument there.
        required |= {
            f"rope_scaling.{name}": (rope.get(name), allowed)
            for name, allowed in (
                ("low_freq_factor", 1.0),
                ("high_freq_factor", 4.0),
                ("original_max_position_embeddings", 8192),
            )
        }
    else:
        required["rope_scaling.rope_type"] = (_rope_type(values), "default")
    for field, (value, allowed) in required.items():
        if value != allowed:
            raise ConfigError(
                f"{where} has {field}={value!r}; only {allowed!r} is supported, choose another "
                "model"
            )
