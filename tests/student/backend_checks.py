"""What ``backend_program.py`` looks at, once Megatron-Core has been imported among stand-ins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from sod_mcore.config import ConfigError, OptimizerConfig, StudentConfig
from sod_mcore.student.architecture import read_architecture
from sod_mcore.student.attention import PackedRow, describe_packed_row
from sod_mcore.student.backend import Backend, choose_backend
from sod_mcore.student.conversion.export import iterate_hf_tensors
from sod_mcore.student.conversion.load import load_hf_weights
from sod_mcore.student.model import build_gpt_model
from sod_mcore.student.model_config import ParallelSizes, check_layout, transformer_config
from sod_mcore.student.parallel_state import current_layout, distributed
from sod_mcore.student.student import Student, UpdateResult
from tests.student.harness import make_examples

SEQUENCES = ((5, 17, 99, 4, 63, 8, 70, 2), (11, 3, 3, 80, 25))
EXPORT_BUCKET = 1 << 20
OPTIMIZER = OptimizerConfig(lr=1e-3)
Tensors = dict[str, torch.Tensor]


@contextmanager
def one_rank(store: Path) -> Iterator[None]:
    """Megatron's parallel state of a single process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    with distributed(ParallelSizes(1, 1, 1, 1), seed=1):
        yield


def student_config(
    folder: Path, precision: str = "bf16", model: str = "tied", **fields: Any
) -> StudentConfig:
    """A student of one of the folder's models."""
    path = str(folder / "models" / model)
    return StudentConfig(model_path=path, precision=precision, **fields)  # type: ignore[arg-type]


def choices(folder: Path) -> dict[str, Backend | str]:
    """What is chosen, or the refusal, for several settings."""

    def choose(**fields: Any) -> Backend | str:
        student = student_config(folder, **fields)
        try:
            check_layout(student, 1)
        except ConfigError as error:
            return str(error)
        return choose_backend(student)

    return {
        "auto": choose(),
        "fp32": choose(precision="fp32"),
        "local": choose(transformer_implementation="local"),
        "asked": choose(transformer_implementation="transformer_engine"),
        "asked_fp32": choose(precision="fp32", transformer_implementation="transformer_engine"),
        "no_fusion": choose(megatron={"gradient_accumulation_fusion": False}),
        "fusion": choose(megatron={"gradient_accumulation_fusion": True}),
        "rope_fusion": choose(megatron={"apply_rope_fusion": True}),
        "local_rope_fusion": choose(
            transformer_implementation="local", megatron={"apply_rope_fusion": True}
        ),
        "context_parallel": choose(megatron={"context_parallel_size": 2}),
        "transformer_impl": choose(megatron={"transformer_impl": "local"}),
    }


def layer_classes(folder: Path) -> dict[str, str]:
    """Module name -> class, of the first layer and the final norm."""
    decoder = _build(student_config(folder)).decoder
    modules = [*decoder.layers[0].named_modules(), ("final_layernorm", decoder.final_layernorm)]
    return {name: type(module).__name__ for name, module in modules}


def gradients(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Loss, weights and gradients of Transformer Engine's layers under Hugging Face names.

    In float32, which a run would refuse, so that the comparison is a sharp one.
    """
    results = {}
    for model_name in ("tied", "qwen2"):
        for packing in ("padded", "packed"):
            config = student_config(folder, "fp32", model_name)
            model = _build(
                config, transformer_impl="transformer_engine", gradient_accumulation_fusion=False
            )
            weights = _hf_tensors(model, config)
            if packing == "packed":
                row = describe_packed_row([len(ids) for ids in SEQUENCES], torch.device("cpu"))
                loss = _cross_entropy(model, config, SEQUENCES, row)
            else:
                losses = [_cross_entropy(model, config, [ids], None) for ids in SEQUENCES]
                loss = torch.stack(losses).sum()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.grad)
            results[model_name, packing] = {
                "loss": loss.item(),
                "weights": weights,
                "gradients": _hf_tensors(model, config),
            }
    return results


def train_and_resume(folder: Path, scenario: str) -> dict[str, Any]:
    """Four updates; two, a checkpoint and two more; the same checkpoint under other layers."""
    config = student_config(folder)
    directory = folder / f"{scenario}_checkpoints"
    first = _student(config)
    straight = [_update(first) for _ in range(4)]
    second = _student(config)
    resumed = [_update(second) for _ in range(2)]
    second.save_checkpoint(directory, 2, {"step": 2})
    third = _student(config, load_hf=False)
    third.load_checkpoint(directory)
    resumed += [_update(third) for _ in range(2)]
    local = dataclasses.replace(config, transformer_implementation="local")
    other = _student(local, load_hf=False)
    other.load_checkpoint(directory)
    continued = [_update(other) for _ in range(2)]
    other.save_checkpoint(folder / f"{scenario}_local", 4, {"step": 4})
    back = _student(config, load_hf=False)
    back.load_checkpoint(folder / f"{scenario}_local")
    return {
        "adam": type(_inner_optimizer(first)).__module__,
        "straight": straight,
        "resumed": resumed,
        "straight_weights": _weights(first),
        "resumed_weights": _weights(third),
        "continued": continued,
        "local_weights": _weights(other),
        "back_weights": _weights(back),
        "from_scratch_local": [_update(student) for student in [_student(local)] for _ in range(2)],
    }


def updates_with_and_without_fusion(folder: Path) -> dict[bool, Tensors]:
    """Weights after two updates in float32, by whether weight gradients are fused."""
    results = {}
    for is_fused in (True, False):
        fields: Any = {"megatron": {"gradient_accumulation_fusion": is_fused}}
        student = _student(student_config(folder, "fp32", **fields))
        for _ in range(2):
            _update(student)
        results[is_fused] = _weights(student)
    return results


def _build(config: StudentConfig, **changes: Any) -> GPTModel:
    """The GPTModel with loaded weights; ``changes`` are of Megatron's configuration."""
    architecture, layout = read_architecture(config.model_path), current_layout()
    megatron_config = dataclasses.replace(transformer_config(config, architecture), **changes)
    model = build_gpt_model(megatron_config, architecture, layout)
    load_hf_weights(model, architecture, layout, config.model_path)
    return model


def _cross_entropy(
    model: GPTModel,
    config: StudentConfig,
    sequences: Sequence[tuple[int, ...]],
    packed_row: PackedRow | None,
) -> torch.Tensor:
    """Sum over all tokens but the first of each sequence."""
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    logits = model(ids[None], positions[None], None, packed_seq_params=packed_row)[0]
    rows = (positions[1:] > 0).nonzero().squeeze(1)
    real = logits[rows, : read_architecture(config.model_path).vocab_size]
    return torch.nn.functional.cross_entropy(real, ids[rows + 1], reduction="sum")


def _hf_tensors(model: GPTModel, config: StudentConfig) -> Tensors:
    architecture = read_architecture(config.model_path)
    buckets = iterate_hf_tensors(model, architecture, current_layout(), EXPORT_BUCKET)
    return {name: tensor.detach().clone() for bucket in buckets for name, tensor in bucket}


def _student(config: StudentConfig, *, load_hf: bool = True) -> Student:
    student = Student.build(config, OPTIMIZER, {}, total_updates=10, seed=1)
    if load_hf:
        student.load_hf(config.model_path)
    return student


def _update(student: Student) -> UpdateResult:
    examples = make_examples()
    return student.train_sft_mini_batch([examples[:3], examples[3:]])


def _weights(student: Student) -> Tensors:
    buckets = student.hf_tensors(EXPORT_BUCKET)
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket}


def _inner_optimizer(student: Student) -> torch.optim.Optimizer:
    (megatron_optimizer,) = student.optimizer.chained_optimizers
    optimizer: torch.optim.Optimizer = megatron_optimizer.optimizer
    return optimizer
