"""The table from Megatron's parameter names to Hugging Face's, for Qwen3, Qwen2 and Llama.

The three families share their names; they differ in which parameters exist (Qwen3 normalises
queries and keys, Qwen2 has biases on them), which the architecture says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from sod_mcore.student.architecture import Architecture
from sod_mcore.student.conversion.layouts import (
    GateAndUp,
    Layout,
    QueryKeyValue,
    Replicated,
    SplitColumns,
    Vocabulary,
)

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"


@dataclass(frozen=True)
class ParameterMapping:
    """One Megatron parameter of one pipeline stage.

    Attributes:
        megatron_name: name within the stage's GPTModel.
        hf_names: the Hugging Face tensors it is made of.
    """

    megatron_name: str
    hf_names: tuple[str, ...]
    layout: Layout


def layer_table(architecture: Architecture) -> tuple[tuple[str, tuple[str, ...], Layout], ...]:
    """Rows of one transformer layer: Megatron's name, Hugging Face's names, layout."""
    attention = "self_attn.{}_proj.{}"
    rows: list[tuple[str, tuple[str, ...], Layout]] = [
        ("input_layernorm.weight", ("input_layernorm.weight",), Replicated("hidden_size")),
        (
            "self_attention.linear_qkv.weight",
            tuple(attention.format(part, "weight") for part in "qkv"),
            QueryKeyValue(),
        ),
        (
            "self_attention.linear_proj.weight",
            (attention.format("o", "weight"),),
            SplitColumns("num_attention_heads", "kv_channels"),
        ),
        (
            "pre_mlp_layernorm.weight",
            ("post_attention_layernorm.weight",),
            Replicated("hidden_size"),
        ),
        (
            "mlp.linear_fc1.weight",
            ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            GateAndUp(),
        ),
        ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), SplitColumns("ffn_hidden_size")),
    ]
    if architecture.qk_layernorm:
        rows += [
            (
                f"self_attention.{part}_layernorm.weight",
                (f"self_attn.{part}_norm.weight",),
                Replicated("kv_channels"),
            )
            for part in "qk"
        ]
    if architecture.add_qkv_bias:
        rows.append(
            (
                "self_attention.linear_qkv.bias",
                tuple(attention.format(part, "bias") for part in "qkv"),
                QueryKeyValue(is_bias=True),
            )
        )
    return tuple(rows)


def stage_parameters(
    architecture: Architecture, config: TransformerConfig, stage: int
) -> Iterator[ParameterMapping]:
    """The parameters of a pipeline stage that Hugging Face stores, in the model's order.

    The copy of tied embeddings on the last of several stages is not among them.
    """
    if stage == 0:
        yield ParameterMapping(EMBEDDING, ("model.embed_tokens.weight",), Vocabulary())
    offset = get_transformer_layer_offset(config, pp_rank=stage)
    for layer in range(get_num_layers_to_build(config, pp_rank=stage)):
        for megatron_name, hf_names, layout in layer_table(architecture):
            yield ParameterMapping(
                f"decoder.layers.{layer}.{megatron_name}",
                tuple(f"model.layers.{layer + offset}.{name}" for name in hf_names),
                layout,
            )
    if stage == config.pipeline_model_parallel_size - 1:
        yield ParameterMapping(
            "decoder.final_layernorm.weight", ("model.norm.weight",), Replicated("hidden_size")
        )
        if not architecture.tie_word_embeddings:
            yield ParameterMapping(OUTPUT_LAYER, ("lm_head.weight",), Vocabulary())
