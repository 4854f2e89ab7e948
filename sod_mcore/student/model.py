"""Build the student: a GPTModel, wrapped for mixed precision and data parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from sod_mcore.config import StudentConfig
from sod_mcore.student.architecture import Architecture
from sod_mcore.student.attention import SDPAttention
from sod_mcore.student.layers import RMSNorm
from sod_mcore.student.model_config import padded_vocab_size, transformer_config
from sod_mcore.student.parallel_state import ParallelLayout

_EXTRA_STATE = "_extra_state"


def build_model(
    student: StudentConfig,
    architecture: Architecture,
    layout: ParallelLayout,
    *,
    ddp: Mapping[str, Any],
    use_distributed_optimizer: bool,
) -> DistributedDataParallel:
    """This rank's part of the student, in training mode; its weights are not set yet.

    Args:
        student: checked by :func:`sod_mcore.student.model_config.check_layout`.
        ddp: fields of Megatron's DistributedDataParallelConfig, by their own names.
    """
    config = transformer_config(student, architecture)
    model: torch.nn.Module = build_gpt_model(config, architecture, layout)
    if config.bf16:
        model = Float16Module(config, model)
    ddp_fields = {
        "grad_reduce_in_fp32": True,
        "check_for_nan_in_grad": True,
        "use_distributed_optimizer": use_distributed_optimizer,
        **ddp,
    }
    return DistributedDataParallel(config, DistributedDataParallelConfig(**ddp_fields), model)


def build_gpt_model(
    config: TransformerConfig, architecture: Architecture, layout: ParallelLayout
) -> GPTModel:
    """This rank's part of the model, on its device, without any wrapper; weights are not set."""
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_specification(config),
        vocab_size=padded_vocab_size(architecture.vocab_size, layout.tensor_parallel_size),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,
        rope_scaling=architecture.rope_scaling_factor is not None,
        rope_scaling_factor=architecture.rope_scaling_factor or 1.0,
    ).to(layout.device)


def layer_specification(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The layers of this stage, by the implementation that the configuration names."""
    if config.transformer_impl == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        norm = TENorm
    else:
        layer, norm = _local_layer(config), RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=norm
    )


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    """Megatron's local layer with this package's RMSNorm and attention."""
    layer = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SDPAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    return layer


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while not isinstance(model, GPTModel):
        model = model.module  # type: ignore[assignment]
    return model


def sharded_parameters(model: torch.nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Parameter name -> Megatron's sharded tensor, under keys that all implementations share.

    The ``_extra_state`` entries stay out: they hold FP8 scales, which this package never has, and
    Transformer Engine's layers have more of them than the local ones.
    """
    state = unwrap(model).sharded_state_dict(metadata=dict(metadata))
    return {name: value for name, value in state.items() if not name.endswith(_EXTRA_STATE)}


def load_parameters(model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Set the parameters from what :func:`sharded_parameters` became when it was loaded.

    Raises:
        RuntimeError: a parameter is missing, or the model does not have it.
    """
    incompatible = unwrap(model).load_state_dict(state, strict=False)
    names = [*incompatible.missing_keys, *incompatible.unexpected_keys]
    wrong = [name for name in names if not name.endswith(_EXTRA_STATE)]
    if wrong:
        raise RuntimeError(f"the checkpoint does not fit the model: {', '.join(wrong)}")
