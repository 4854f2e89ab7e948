"""Qwen2 and Qwen2.5: Llama's parameters, and biases of queries, keys and values."""

from sod_mcore.student.conversion.layouts import QueryKeyValue
from sod_mcore.student.conversion.llama import LLAMA
from sod_mcore.student.conversion.table import ParameterMapping

QWEN2 = LLAMA.with_layer_rows(
    ParameterMapping(
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        QueryKeyValue(is_bias=True),
    ),
)
