"""Layouts that cannot work are refused in one line before anything starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sod_mcore.config import ConfigError, OptimizerConfig, StudentConfig
from sod_mcore.student.architecture import read_architecture
from sod_mcore.student.model_config import (
    ParallelSizes,
    check_layout,
    padded_vocab_size,
    transformer_config,
)

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "tie_word_embeddings": True,
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write_config(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(folder)


def student(folder: Path, megatron: dict[str, Any], **changes: Any) -> StudentConfig:
    return StudentConfig(model_path=write_config(folder, **changes), megatron=megatron)


def test_sizes_of_a_layout_that_works(tmp_path: Path) -> None:
    config = student(
        tmp_path,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 3,
            "sequence_parallel": True,
        },
    )
    sizes = check_layout(
        config,
        12,
        optimizer=OptimizerConfig(megatron={"adam_eps": 1e-6}),
        ddp={"overlap_grad_reduce": True},
    )
    assert sizes == ParallelSizes(tensor=2, pipeline=3, context=1, data=2)


@pytest.mark.parametrize(
    ("megatron", "world_size", "parts"),
    [
        (
            {"tensor_model_parallel_sise": 2},
            2,
            ["student.megatron.tensor_model_parallel_sise", "tensor_model_parallel_size"],
        ),
        ({"tensor_model_parallel_size": 4}, 4, ["num_query_groups = 2", "is 4"]),
        ({"tensor_model_parallel_size": 3}, 3, ["num_attention_heads = 4", "is 3"]),
        ({"tensor_model_parallel_size": "two"}, 2, ["'two'", "integer"]),
        ({"tensor_model_parallel_size": 2}, 3, ["does not divide the 3 processes"]),
        ({"pipeline_model_parallel_size": 4}, 4, ["num_layers = 6", "is 4"]),
        ({"sequence_parallel": True}, 1, ["sequence_parallel is true"]),
        ({"context_parallel_size": 2}, 2, ["context_parallel_size is 2", "TransformerEngine"]),
        ({"num_moe_experts": 8}, 1, ["num_moe_experts is 8", "dense"]),
        ({"hidden_size": 128}, 1, ["hidden_size is 128", "config.json"]),
        ({"bf16": True}, 1, ["student.megatron.bf16", "student.precision"]),
        ({"calculate_per_token_loss": False}, 1, ["calculate_per_token_loss is False"]),
        ({"recompute_granularity": "some"}, 1, ["Megatron-Core refuses", "some"]),
    ],
)
def test_refusals(
    tmp_path: Path, megatron: dict[str, Any], world_size: int, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_layout(student(tmp_path, megatron), world_size)
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"precision": "fp32", "lm_head_dtype": "bf16"}, "as the model; set it to fp32"),
        ({"precision": "bf16", "lm_head_dtype": "fp32"}, "set student.lm_head to chunked"),
    ],
)
def test_logits_of_a_precision_that_cannot_be(
    tmp_path: Path, fields: dict[str, Any], part: str
) -> None:
    config = StudentConfig(model_path=write_config(tmp_path), **fields)
    with pytest.raises(ConfigError, match=f"student.lm_head_dtype is .*{part}"):
        check_layout(config, 1)
    check_layout(dataclasses.replace(config, lm_head="chunked", lm_head_dtype="fp32"), 1)


@pytest.mark.parametrize(
    ("optimizer", "ddp", "parts"),
    [
        ({"adam_epsilon": 1}, {}, ["optimizer.megatron.adam_epsilon", "adam_eps"]),
        ({"lr": 1.0}, {}, ["optimizer.megatron.lr", "optimizer.lr"]),
        ({}, {"overlap_grads": True}, ["ddp.overlap_grads", "overlap_grad_reduce"]),
        ({}, {"average_in_collective": True}, ["ddp.average_in_collective is True"]),
        ({}, {"use_distributed_optimizer": True}, ["optimizer.distributed"]),
    ],
)
def test_optimizer_and_ddp_refusals(
    tmp_path: Path, optimizer: dict[str, Any], ddp: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_layout(
            student(tmp_path, {}), 1, optimizer=OptimizerConfig(megatron=optimizer), ddp=ddp
        )
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method='fp8'"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor=2.0"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": None}}, "high_freq_factor=None"),
    ],
)
def test_models_that_would_be_built_wrong(
    tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    changed = {**changes, "rope_parameters": None} if "rope_scaling" in changes else changes
    with pytest.raises(ConfigError, match=part.replace("'", ".")):
        read_architecture(write_config(tmp_path, **changed))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_architecture(tmp_path / "nowhere")


def test_rope_base_of_either_format(tmp_path: Path) -> None:
    assert read_architecture(write_config(tmp_path)).rotary_base == 1e6
    older = write_config(tmp_path, rope_parameters=None, rope_theta=5e5)
    assert read_architecture(older).rotary_base == 5e5


def test_rope_scaling_of_either_format(tmp_path: Path) -> None:
    assert read_architecture(write_config(tmp_path)).rope_scaling_factor is None
    newer = write_config(tmp_path, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert read_architecture(newer).rope_scaling_factor == 32.0
    older = write_config(tmp_path, rope_parameters=None, rope_theta=5e5, rope_scaling=LLAMA3)
    assert read_architecture(older) == read_architecture(newer)


def test_overrides_reach_megatron(tmp_path: Path) -> None:
    config = student(tmp_path, {"attention_softmax_in_fp32": False, "hidden_dropout": 0.1})
    built = transformer_config(config, read_architecture(tmp_path))
    assert built.hidden_dropout == 0.1
    assert not built.attention_softmax_in_fp32
    assert built.calculate_per_token_loss
    assert built.params_dtype == torch.bfloat16


def test_vocabulary_padding() -> None:
    assert padded_vocab_size(151936, 1) == 151936
    assert padded_vocab_size(151936, 2) == 152064
    assert padded_vocab_size(151936, 8) == 152576
