"""Qwen3: Llama's parameters, and norms of each head's query and key."""

from sod_mcore.student.conversion.layouts import Replicated
from sod_mcore.student.conversion.llama import LLAMA
from sod_mcore.student.conversion.table import ParameterMapping

QWEN3 = LLAMA.with_layer_rows(
    ParameterMapping(
        "self_attention.q_layernorm.weight",
        ("self_attn.q_norm.weight",),
        Replicated("kv_channels"),
    ),
    ParameterMapping(
        "self_attention.k_layernorm.weight",
        ("self_attn.k_norm.weight",),
        Replicated("kv_channels"),
    ),
)
