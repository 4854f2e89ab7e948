"""Llama's parameters; the other families have the same ones and more."""

from sod_mcore.student.conversion.layouts import (
    GateAndUp,
    QueryKeyValue,
    Replicated,
    SplitColumns,
    Vocabulary,
)
from sod_mcore.student.conversion.table import FamilyTable, ParameterMapping

LLAMA = FamilyTable(
    embedding=ParameterMapping(
        "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()
    ),
    layer=(
        ParameterMapping(
            "input_layernorm.weight",
            ("input_layernorm.weight",),
            Replicated("hidden_size"),
        ),
        ParameterMapping(
            "self_attention.linear_qkv.weight",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            QueryKeyValue(),
        ),
        ParameterMapping(
            "self_attention.linear_proj.weight",
            ("self_attn.o_proj.weight",),
            SplitColumns("num_attention_heads", "kv_channels"),
        ),
        ParameterMapping(
            "pre_mlp_layernorm.weight",
            ("post_attention_layernorm.weight",),
            Replicated("hidden_size"),
        ),
        ParameterMapping(
            "mlp.linear_fc1.weight",
            ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            GateAndUp(),
        ),
        ParameterMapping(
            "mlp.linear_fc2.weight",
            ("mlp.down_proj.weight",),
            SplitColumns("ffn_hidden_size"),
        ),
    ),
    final_norm=ParameterMapping(
        "decoder.final_layernorm.weight", ("model.norm.weight",), Replicated("hidden_size")
    ),
    output_layer=ParameterMapping("output_layer.weight", ("lm_head.weight",), Vocabulary()),
)
