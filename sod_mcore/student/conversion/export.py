"""Whole Hugging Face tensors from a split model, in buckets of bounded size.

All ranks walk the same list of parameters, which follows from the configuration alone, so no rank
has to tell another what comes next. The first replica does the work: each stage gathers a parameter
over its tensor-parallel ranks, and its first rank sends the result to global rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel

from sod_mcore.student.architecture import Architecture
from sod_mcore.student.conversion.families import stage_parameters
from sod_mcore.student.conversion.table import ParameterMapping
from sod_mcore.student.parallel_state import ParallelLayout

NamedTensors = list[tuple[str, torch.Tensor]]


def iterate_hf_tensors(
    model: GPTModel,
    architecture: Architecture,
    layout: ParallelLayout,
    bucket_bytes: int,
    parameters: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[NamedTensors]:
    """Yield the model's weights under Hugging Face names; collective over all ranks.

    Every rank must consume the iterator to its end. A bucket is closed before the parameter that
    would take it beyond ``bucket_bytes``; a larger parameter is a bucket of its own.

    Args:
        parameters: other values for the model's parameters, by their names, shapes and dtype.

    Yields:
        on global rank 0, the next tensors in the model's dtype on its device, not yet in use by the
        model; empty lists, as many, on all other ranks.
    """
    parameters = dict(model.named_parameters()) if parameters is None else parameters
    bucket: NamedTensors = []
    size = 0
    for stage in range(layout.pipeline_parallel_size):
        for mapping in stage_parameters(architecture, model.config, stage):
            next_size = _size_in_bytes(mapping, architecture, model.config.params_dtype)
            if size and size + next_size > bucket_bytes:
                yield bucket
                bucket, size = [], 0
            size += next_size
            if layout.data_parallel_rank == 0 and layout.context_parallel_rank == 0:
                bucket += _collect(parameters, mapping, stage, architecture, layout)
    if size:
        yield bucket


def _size_in_bytes(
    mapping: ParameterMapping, architecture: Architecture, dtype: torch.dtype
) -> int:
    shapes = mapping.layout.shapes(architecture)
    return sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize


def _collect(
    parameters: Mapping[str, torch.Tensor],
    mapping: ParameterMapping,
    stage: int,
    architecture: Architecture,
    layout: ParallelLayout,
) -> NamedTensors:
    """Gather one parameter on its stage and move it to global rank 0."""
    tensors: tuple[torch.Tensor, ...] = ()
    if layout.pipeline_parallel_rank == stage:
        shards = _gather(parameters[mapping.megatron_name].detach(), layout)
        if shards is not None:
            tensors = mapping.layout.merge(shards, architecture)
    if stage > 0 and layout.tensor_parallel_rank == 0:
        group = mpu.get_pipeline_model_parallel_group()
        if layout.pipeline_parallel_rank == stage:
            for tensor in tensors:
                dist.send(tensor.contiguous(), group=group, group_dst=0)
        elif layout.pipeline_parallel_rank == 0:
            dtype = next(iter(parameters.values())).dtype
            tensors = tuple(
                _receive(shape, dtype, layout.device, stage, group)
                for shape in mapping.layout.shapes(architecture)
            )
    if layout.rank != 0:
        return []
    return list(zip(mapping.hf_names, tensors, strict=True))


def _gather(parameter: torch.Tensor, layout: ParallelLayout) -> list[torch.Tensor] | None:
    """The parameter's shards on the stage's first tensor-parallel rank; None on the others."""
    if layout.tensor_parallel_size == 1:
        return [parameter.clone()]
    is_first = layout.tensor_parallel_rank == 0
    shards = [torch.empty_like(parameter) for _ in range(layout.tensor_parallel_size)]
    dist.gather(
        parameter.contiguous(),
        shards if is_first else None,
        group=mpu.get_tensor_model_parallel_group(),
        group_dst=0,
    )
    return shards if is_first else None


def _receive(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    stage: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    dist.recv(tensor, group=group, group_src=stage)
    return tensor
