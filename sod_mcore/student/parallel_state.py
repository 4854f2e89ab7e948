"""Start torch.distributed and Megatron's process groups, and say where this rank stands in them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from sod_mcore.student.model_config import ParallelSizes

DEFAULT_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class ParallelLayout:
    """This rank's place in the parallel layout, and the groups that are not Megatron's.

    Attributes:
        world_group: group of all ranks with a gloo backend for CPU tensors, for host data.
    """

    rank: int
    world_size: int
    tensor_parallel_rank: int
    tensor_parallel_size: int
    pipeline_parallel_rank: int
    pipeline_parallel_size: int
    context_parallel_rank: int
    context_parallel_size: int
    data_parallel_rank: int
    data_parallel_size: int
    device: torch.device
    world_group: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_parallel_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_parallel_rank == self.pipeline_parallel_size - 1

    @property
    def reports_loss(self) -> bool:
        """Whether this rank speaks for its replica: one rank of the last stage."""
        return (
            self.is_last_stage
            and self.tensor_parallel_rank == 0
            and self.context_parallel_rank == 0
        )


def local_device() -> torch.device:
    """The device of this process: its GPU by torchrun's LOCAL_RANK, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def distributed(
    sizes: ParallelSizes, *, seed: int, timeout: timedelta = DEFAULT_TIMEOUT
) -> Iterator[ParallelLayout]:
    """:func:`initialize_parallel_state` on entry, :func:`destroy_parallel_state` on exit."""
    layout = initialize_parallel_state(sizes, seed=seed, timeout=timeout)
    try:
        yield layout
    finally:
        destroy_parallel_state()


def initialize_parallel_state(
    sizes: ParallelSizes, *, seed: int, timeout: timedelta = DEFAULT_TIMEOUT
) -> ParallelLayout:
    """Start torch.distributed from torchrun's environment, then Megatron's groups, then seed.

    A torch.distributed that runs already is kept, so one process can try several layouts in turn.

    Args:
        sizes: checked sizes, from :func:`sod_mcore.student.model_config.check_layout`.
        seed: seed of Python, numpy, torch and Megatron's random states.
        timeout: longest time a collective may take before the run ends with an error.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend=backend, timeout=timeout)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        context_parallel_size=sizes.context,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
    )
    layout = current_layout()
    seed_everything(seed, layout)
    return layout


def current_layout() -> ParallelLayout:
    """This rank's place, once the parallel state is initialised."""
    assert dist.group.WORLD is not None, "initialize_parallel_state comes first"
    return ParallelLayout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_parallel_rank=mpu.get_tensor_model_parallel_rank(),
        tensor_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_parallel_rank=mpu.get_pipeline_model_parallel_rank(),
        pipeline_parallel_size=mpu.get_pipeline_model_parallel_world_size(),
        context_parallel_rank=mpu.get_context_parallel_rank(),
        context_parallel_size=mpu.get_context_parallel_world_size(),
        data_parallel_rank=mpu.get_data_parallel_rank(),
        data_parallel_size=mpu.get_data_parallel_world_size(),
        device=local_device(),
        world_group=dist.group.WORLD,
    )


def seed_everything(seed: int, layout: ParallelLayout) -> None:
    """Seed all generators; pipeline stages draw different numbers, as Megatron's own training."""
    seed = seed + 100 * layout.pipeline_parallel_rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def destroy_model_parallel() -> None:
    """Take down Megatron's groups; torch.distributed stays, for another layout."""
    mpu.destroy_model_parallel()


def destroy_parallel_state() -> None:
    """Take down Megatron's groups and torch.distributed."""
    mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
