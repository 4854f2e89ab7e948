"""From a Hugging Face folder and ``student.megatron`` to Megatron's TransformerConfig, checked.

Everything that can be refused is refused here, before torch.distributed starts and before any
weight is read: unknown field names, values that another part of the package owns, sizes that do not
divide.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from sod_mcore.config import ConfigError, OptimizerConfig, StudentConfig
from sod_mcore.student.architecture import Architecture, read_architecture
from sod_mcore.student.backend import choose_backend

VOCABULARY_DIVISOR = 128
"""Rows of the embedding are padded to a multiple of this times the tensor-parallel size, as in
Megatron's own training; padded columns never enter a normaliser or an exported checkpoint."""

_FROM_CONFIG_JSON = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "layernorm_epsilon",
    "qk_layernorm",
    "add_qkv_bias",
    "add_bias_linear",
    "gated_linear_unit",
    "activation_func",
    "normalization",
)
_FROM_PRECISION = ("bf16", "fp16", "params_dtype", "pipeline_dtype", "autocast_dtype")
_ONLY_VALUE: dict[str, tuple[Any, str]] = {
    "calculate_per_token_loss": (True, "losses are means over the tokens of the mini-batch"),
    "context_parallel_size": (
        1,
        "rows are not split over ranks, with or without TransformerEngine",
    ),
    "expert_model_parallel_size": (1, "only dense models are supported"),
    "num_moe_experts": (None, "only dense models are supported"),
    "virtual_pipeline_model_parallel_size": (None, "interleaved stages are not supported"),
    "num_layers_per_virtual_pipeline_stage": (None, "interleaved stages are not supported"),
    "mtp_num_layers": (None, "multi-token prediction is not supported"),
    "defer_embedding_wgrad_compute": (False, "the loss selects rows before the output layer"),
    "masked_softmax_fusion": (False, "attention computes no masked softmax of its own"),
    "bias_dropout_fusion": (False, "it needs torch.compile in each worker"),
    "persist_layer_norm": (False, "no RMSNorm has such a kernel"),
    "fp8": (None, "rows are not padded to the multiples that FP8 products need"),
    "fp4": (None, "rows are not padded to the multiples that FP4 products need"),
}
_ONLY_DDP_VALUE: dict[str, tuple[Any, str]] = {
    "average_in_collective": (False, "losses are means over the tokens of the mini-batch"),
    "use_megatron_fsdp": (False, "Megatron FSDP is not supported"),
    "use_custom_fsdp": (False, "Megatron FSDP is not supported"),
}
_OWN_OPTIMIZER_FIELDS = {
    "lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.adam_betas",
    "adam_beta2": "optimizer.adam_betas",
    "clip_grad": "optimizer.clip_grad",
    "use_distributed_optimizer": "optimizer.distributed",
    "bf16": "student.precision",
    "fp16": "student.precision",
    "params_dtype": "student.precision",
}


@dataclass(frozen=True)
class ParallelSizes:
    """How many ranks share each dimension; their product is the world size."""

    tensor: int
    pipeline: int
    context: int
    data: int


def check_layout(
    student: StudentConfig,
    world_size: int,
    *,
    optimizer: OptimizerConfig | None = None,
    ddp: Mapping[str, Any] | None = None,
) -> ParallelSizes:
    """Refuse a student that cannot be built on ``world_size`` ranks.

    Reads ``config.json`` and nothing else.

    Raises:
        ConfigError: one line with the field, its value, what is allowed and the mend.
    """
    architecture = read_architecture(student.model_path)
    _check_names("student.megatron", student.megatron, TransformerConfig)
    _check_fixed("student.megatron", student.megatron, _ONLY_VALUE)
    for field in student.megatron:
        if field in _FROM_CONFIG_JSON:
            raise ConfigError(
                f"student.megatron.{field} is {student.megatron[field]!r}, but this field comes "
                "from the model's config.json; remove it"
            )
        if field in _FROM_PRECISION:
            raise ConfigError(f"student.megatron.{field}: set student.precision instead")
    _check_backend(student)
    _check_lm_head(student)
    sizes = _parallel_sizes(student.megatron, world_size)
    _check_divisibility(architecture, student.megatron, sizes)
    if optimizer is not None:
        _check_names("optimizer.megatron", optimizer.megatron, MegatronOptimizerConfig)
        for field in optimizer.megatron:
            if field in _OWN_OPTIMIZER_FIELDS:
                raise ConfigError(
                    f"optimizer.megatron.{field}: set {_OWN_OPTIMIZER_FIELDS[field]} instead"
                )
    if ddp is not None:
        _check_names("ddp", ddp, DistributedDataParallelConfig)
        _check_fixed("ddp", ddp, _ONLY_DDP_VALUE)
        if "use_distributed_optimizer" in ddp:
            raise ConfigError("ddp.use_distributed_optimizer: set optimizer.distributed instead")
    try:
        transformer_config(student, architecture)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"student.megatron: Megatron-Core refuses {student.megatron}: {error}"
        ) from error
    return sizes


def _check_backend(student: StudentConfig) -> None:
    """Refuse what the layers of this machine cannot do."""
    if "transformer_impl" in student.megatron:
        raise ConfigError(
            "student.megatron.transformer_impl: set student.transformer_implementation instead"
        )
    backend = choose_backend(student)
    if student.megatron.get("apply_rope_fusion") and backend.layers == "local":
        raise ConfigError(
            "student.megatron.apply_rope_fusion is true, but it needs TransformerEngine's layers: "
            f"{backend.reason}; mend that, or remove it"
        )


def _check_lm_head(student: StudentConfig) -> None:
    """Refuse logits of a precision that the output layer cannot give."""
    wanted = student.lm_head_dtype
    if wanted is None or wanted == student.precision:
        return
    if wanted == "bf16":
        raise ConfigError(
            "student.lm_head_dtype is 'bf16', but student.precision is 'fp32': logits are at least "
            "as precise as the model; set it to fp32 or remove it"
        )
    if student.lm_head == "full":
        raise ConfigError(
            "student.lm_head_dtype is 'fp32' with student.precision 'bf16', but Megatron's output "
            "layer rounds its logits to bf16; set student.lm_head to chunked, or remove it"
        )


def transformer_config(student: StudentConfig, architecture: Architecture) -> TransformerConfig:
    """Megatron's configuration of the student; ``student.megatron`` overrides the defaults."""
    is_bf16 = student.precision == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    pipeline_size = student.megatron.get("pipeline_model_parallel_size", 1)
    backend = choose_backend(student)
    fields: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.kv_channels,
        "layernorm_epsilon": architecture.layernorm_epsilon,
        "qk_layernorm": architecture.qk_layernorm,
        "add_qkv_bias": architecture.add_qkv_bias,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": is_bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": finalize_model_grads,
        # Weights are loaded at once, so their initialisation would be wasted.
        "perform_initialization": False,
        "transformer_impl": backend.layers,
        "gradient_accumulation_fusion": backend.gradient_accumulation_fusion,
        # These fusions need torch.compile, or kernels that this model does not call.
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        # Micro-batches differ in length, so stages tell each other the shapes; Megatron asks for
        # this dispatcher with them, even where there are no experts.
        "variable_seq_lengths": pipeline_size > 1,
        "moe_token_dispatcher_type": "alltoall",
    }
    return TransformerConfig(**{**fields, **student.megatron})


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding over all tensor-parallel ranks."""
    divisor = VOCABULARY_DIVISOR * tensor_parallel_size
    return -(-vocab_size // divisor) * divisor


def _check_names(section: str, values: Mapping[str, Any], target: type) -> None:
    allowed = {field.name for field in dataclasses.fields(target) if field.init}
    for name in values:
        if name not in allowed:
            raise ConfigError(
                f"{section}.{name} is not a field of Megatron-Core's {target.__name__}"
                f"{_suggestion(name, allowed)}; remove it or correct the name"
            )


def _suggestion(name: str, allowed: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(allowed), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _check_fixed(
    section: str, values: Mapping[str, Any], only: Mapping[str, tuple[Any, str]]
) -> None:
    for name, (allowed, reason) in only.items():
        if name in values and values[name] != allowed:
            raise ConfigError(
                f"{section}.{name} is {values[name]!r}; only {allowed!r} is supported, because "
                f"{reason}; remove it"
            )


def _parallel_sizes(megatron: Mapping[str, Any], world_size: int) -> ParallelSizes:
    sizes = {}
    for dimension in ("tensor_model", "pipeline_model", "context"):
        field = f"{dimension}_parallel_size"
        value = megatron.get(field, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"student.megatron.{field} is {value!r}; give an integer of at least 1"
            )
        sizes[dimension] = value
    tensor, pipeline, context = sizes["tensor_model"], sizes["pipeline_model"], sizes["context"]
    product = tensor * pipeline * context
    if world_size % product:
        raise ConfigError(
            f"student.megatron: tensor {tensor} x pipeline {pipeline} x context {context} = "
            f"{product} ranks hold one replica, which does not divide the {world_size} processes "
            f"that torchrun started; change the sizes or --nproc-per-node"
        )
    return ParallelSizes(tensor, pipeline, context, world_size // product)


def check_divisibility(
    architecture: Architecture,
    sizes: ParallelSizes,
    *,
    tensor_field: str = "student.megatron.tensor_model_parallel_size",
    pipeline_field: str = "student.megatron.pipeline_model_parallel_size",
    even_stages: bool = True,
) -> None:
    """Refuse sizes that do not divide the model.

    Args:
        tensor_field: what the user calls the tensor-parallel size.
        pipeline_field: what the user calls the pipeline-parallel size.
        even_stages: every stage has as many layers.

    Raises:
        ConfigError: the first size that does not divide.
    """
    for field in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(architecture, field)
        if size % sizes.tensor:
            raise ConfigError(
                f"{tensor_field} is {sizes.tensor}, which does not divide the model's {field} = "
                f"{size}; choose a divisor of {size}"
            )
    if even_stages and architecture.num_layers % sizes.pipeline:
        raise ConfigError(
            f"{pipeline_field} is {sizes.pipeline}, which does not divide the model's num_layers = "
            f"{architecture.num_layers}; choose a divisor of {architecture.num_layers}"
        )


def _check_divisibility(
    architecture: Architecture, megatron: Mapping[str, Any], sizes: ParallelSizes
) -> None:
    uneven = (
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
    )
    is_uneven = any(name in megatron for name in uneven)
    check_divisibility(architecture, sizes, even_stages=not is_uneven)
    if megatron.get("sequence_parallel") and sizes.tensor == 1:
        raise ConfigError(
            "student.megatron.sequence_parallel is true with tensor_model_parallel_size 1; remove "
            "it or raise tensor_model_parallel_size"
        )
