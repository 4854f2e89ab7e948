"""Which table belongs to which architecture, and which of its parameters a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from sod_mcore.student.architecture import Architecture
from sod_mcore.student.conversion.llama import LLAMA
from sod_mcore.student.conversion.qwen2 import QWEN2
from sod_mcore.student.conversion.qwen3 import QWEN3
from sod_mcore.student.conversion.table import FamilyTable, ParameterMapping

TABLES: Mapping[str, FamilyTable] = {
    "LlamaForCausalLM": LLAMA,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}


def stage_parameters(
    architecture: Architecture, config: TransformerConfig, stage: int
) -> Iterator[ParameterMapping]:
    """The parameters of a pipeline stage that Hugging Face stores, in the model's order.

    The copy of tied embeddings on the last of several stages is not among them.
    """
    table = TABLES[architecture.name]
    if stage == 0:
        yield table.embedding
    offset = get_transformer_layer_offset(config, pp_rank=stage)
    for layer in range(get_num_layers_to_build(config, pp_rank=stage)):
        for mapping in table.layer:
            yield mapping.in_layer(layer, layer + offset, config.transformer_impl)
    if stage == config.pipeline_model_parallel_size - 1:
        yield table.final_norm
        if not architecture.tie_word_embeddings:
            yield table.output_layer


def tied_output_layer(architecture: Architecture) -> ParameterMapping:
    """The last stage's copy of tied embeddings, which Hugging Face stores once."""
    table = TABLES[architecture.name]
    return ParameterMapping(
        table.output_layer.megatron_name, table.embedding.hf_names, table.output_layer.layout
    )


def all_hf_names(architecture: Architecture) -> set[str]:
    """Names of all tensors of a Hugging Face folder."""
    table = TABLES[architecture.name]
    mappings = [table.embedding, table.final_norm]
    if not architecture.tie_word_embeddings:
        mappings.append(table.output_layer)
    for layer in range(architecture.num_layers):
        mappings += [mapping.in_layer(layer, layer) for mapping in table.layer]
    return {name for mapping in mappings for name in mapping.hf_names}
