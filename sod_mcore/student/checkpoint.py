"""Checkpoints that any layout can continue from: Megatron's torch_dist format, plus random states.

A checkpoint is written under a temporary name, synced and renamed; only then does the file
``latest`` name it, and only then are older ones deleted. A crash at any moment leaves the previous
checkpoint in place.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException

from sod_mcore.config import ConfigError
from sod_mcore.files import make_empty, naming, replace_folder, temporary_folder, write_text
from sod_mcore.student.average import WeightAverage
from sod_mcore.student.exchange import broadcast_from_rank0, wait_for_all
from sod_mcore.student.model import load_parameters, sharded_parameters, unwrap
from sod_mcore.student.optimizer import initialize_adam_state
from sod_mcore.student.parallel_state import ParallelLayout
from sod_mcore.student.rank_zero import on_rank_zero

LATEST = "latest"
PROGRESS = "progress.json"
DISK_PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class TrainingState:
    """Everything on this rank that a checkpoint holds."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    layout: ParallelLayout
    average: WeightAverage | None = None


def save(
    state: TrainingState, directory: Path, step: int, progress: Mapping[str, Any], *, keep: int
) -> None:
    """Write ``directory/step_<step>``; collective over all ranks, complete on return.

    Args:
        directory: a folder that all ranks see.
        progress: JSON-able; comes back from :func:`load_newest`.
        keep: newest checkpoints that are kept, this one included.

    Raises:
        OSError: the disk is full, for instance; the unfinished checkpoint is removed.
        RankZeroError: on the other ranks, when rank 0 tells what failed.
    """
    folder, group = directory / f"step_{step:08d}", state.layout.world_group
    temporary = temporary_folder(folder)
    with _removed_on_failure(temporary), naming(directory):
        on_rank_zero(lambda: make_empty(temporary), group)
        _write_tensors(state, temporary)
        _write_random_states(_random_file(temporary, state.layout.rank))
        wait_for_all(group)
        on_rank_zero(lambda: _complete(temporary, folder, state, progress, keep), group)


def load_newest(state: TrainingState, directory: Path) -> dict[str, Any] | None:
    """Restore the newest complete checkpoint; collective over all ranks.

    Unfinished ones, which a killed process has left, are removed. Random states are restored where
    the checkpoint was written by the same layout; another layout keeps those of its seed.

    Returns:
        the ``progress`` it was saved with, or None if there is no checkpoint.

    Raises:
        ConfigError: it was saved by another kind of optimizer or without the average that this
            run needs, or a file of it is damaged.
    """
    on_rank_zero(lambda: _remove_unfinished(directory), state.layout.world_group)
    newest = (_newest_complete(directory),) if state.layout.rank == 0 else None
    (name,) = broadcast_from_rank0(newest, state.layout.world_group)
    if name is None:
        return None
    folder = directory / name
    header = json.loads((folder / PROGRESS).read_text())
    _check_optimizer(header, _optimizer_header(state), folder)
    if state.average is not None and not header.get("has_average", False):
        raise ConfigError(
            f"teacher.weights is average, but {folder} holds no average: it was saved by a run "
            "without one; set teacher.weights back, or start from an exported folder in another "
            "run.directory"
        )
    initialize_adam_state(state.optimizer)
    loaded = _read_tensors(state, folder)
    load_parameters(state.model, loaded["model"])
    state.optimizer.load_state_dict(loaded["optimizer"])
    if state.average is not None:
        state.average.load(loaded["average"])
    state.schedule.num_steps = 0
    state.schedule.step(header["schedule_steps"])
    if header["layout"] == _layout_header(state.layout):
        _restore_random_states(_random_file(folder, state.layout.rank))
    progress: dict[str, Any] = header["progress"]
    return progress


@contextmanager
def _removed_on_failure(temporary: Path) -> Iterator[None]:
    """Each rank removes it after its own last write, so that the last of them leaves nothing."""
    try:
        yield
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_tensors(state: TrainingState, folder: Path) -> None:
    def explain() -> None:
        # Megatron drops what the disk said to the rank that wrote, so we ask it again.
        with tempfile.TemporaryFile(dir=folder.parent) as file:
            file.write(bytes(DISK_PROBE_BYTES))
        raise RuntimeError(f"{folder}: a rank could not write its part; the lines above tell why")

    try:
        dist_checkpointing.save(_sharded_state(state, is_loading=False), str(folder))
    except CheckpointException:  # no Exception; every rank gets it, before any has cleaned up
        on_rank_zero(explain, state.layout.world_group)


def _read_tensors(state: TrainingState, folder: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(
            _sharded_state(state, is_loading=True), str(folder)
        )
    except CheckpointException as error:  # no Exception; every rank gets it
        causes = "; ".join(f"{type(e).__name__}: {e}" for e, _ in error.failures.values())
        raise ConfigError(
            f"{folder} cannot be read ({causes}); restore its files, or remove the folder to "
            "continue from an older checkpoint"
        ) from error
    return loaded


def _write_random_states(path: Path) -> None:
    content = io.BytesIO()
    torch.save(_random_states(), content)  # to a full disk it would not tell why it failed
    path.write_bytes(content.getvalue())


def _sharded_state(state: TrainingState, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        # The only format that other layouts, and torch's AdamW, can be loaded into.
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    model = sharded_parameters(state.model, metadata)
    optimizer = state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    sharded = {"model": model, "optimizer": optimizer}
    if state.average is not None:
        sharded["average"] = state.average.sharded_state(metadata)
    return sharded


def _complete(
    temporary: Path, final: Path, state: TrainingState, progress: Mapping[str, Any], keep: int
) -> None:
    header = {
        "progress": dict(progress),
        "schedule_steps": state.schedule.num_steps,
        "layout": _layout_header(state.layout),
        "optimizer": _optimizer_header(state),
        "has_average": state.average is not None,
    }
    (temporary / PROGRESS).write_text(json.dumps(header, indent=2) + "\n")
    replace_folder(temporary, final)
    write_text(final.with_name(LATEST), final.name + "\n")
    _remove_unfinished(final.parent)
    folders = sorted(final.parent.glob("step_*"))
    # Later ones are of a run that was given up; this one continues from an earlier step.
    later = [folder for folder in folders if folder.name > final.name]
    for folder in [*later, *folders[: len(folders) - len(later) - keep]]:
        shutil.rmtree(folder)


def _remove_unfinished(directory: Path) -> None:
    """Remove what a process that was killed while saving has left."""
    for folder in directory.glob(".step_*"):
        shutil.rmtree(folder)


def _newest_complete(directory: Path) -> str | None:
    """The checkpoint that ``latest`` names; if that is gone, the newest complete folder."""
    pointer = directory / LATEST
    if pointer.is_file():
        name = pointer.read_text().strip()
        if (directory / name / PROGRESS).is_file():
            return name
    complete = sorted(path.parent.name for path in directory.glob(f"step_*/{PROGRESS}"))
    return complete[-1] if complete else None


def _layout_header(layout: ParallelLayout) -> dict[str, int]:
    return {
        "tensor": layout.tensor_parallel_size,
        "pipeline": layout.pipeline_parallel_size,
        "context": layout.context_parallel_size,
        "data": layout.data_parallel_size,
    }


def _optimizer_header(state: TrainingState) -> dict[str, Any]:
    """The settings that decide which tensors an optimizer has."""
    is_bf16 = unwrap(state.model).config.bf16
    return {
        "optimizer.distributed": state.model.ddp_config.use_distributed_optimizer,
        "student.precision": "bf16" if is_bf16 else "fp32",
    }


def _check_optimizer(
    header: Mapping[str, Any], configured: Mapping[str, Any], folder: Path
) -> None:
    saved = header.get("optimizer", configured)  # earlier versions did not write it
    for name, value in configured.items():
        if saved[name] != value:
            raise ConfigError(
                f"{name} is {json.dumps(value)}, but {folder} was saved with "
                f"{json.dumps(saved[name])}, and its optimizer state fits nothing else; set {name} "
                "back, or start from an exported folder in another run.directory"
            )


def _random_file(folder: Path, rank: int) -> Path:
    return folder / f"random_{rank:05d}.pt"


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _restore_random_states(path: Path) -> None:
    states = torch.load(path, weights_only=False)  # written by this program
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["megatron"])
