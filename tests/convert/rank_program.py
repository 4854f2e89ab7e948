"""What each torchrun process of the conversion tests runs: all models on all layouts.

First pass: every model becomes a checkpoint on every layout, and its logits are computed from what
that checkpoint holds. Second pass: every checkpoint becomes a Hugging Face folder, on another
layout than the one that wrote it. Last, a checkpoint of training becomes one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from sod_mcore.config import OptimizerConfig, StudentConfig
from sod_mcore.student.conversion.convert import hf_to_megatron, megatron_to_hf
from sod_mcore.student.conversion.megatron_checkpoint import find_checkpoint
from sod_mcore.student.model_config import ParallelSizes
from sod_mcore.student.parallel_state import (
    ParallelLayout,
    destroy_model_parallel,
    initialize_parallel_state,
)
from sod_mcore.student.student import Student
from tests.convert.logits import logits_of
from tests.convert.models import LAYOUTS, NAMES, TOKENS
from tests.student.harness import make_examples

BUCKET_BYTES = 60_000


def main() -> None:
    """Work in the folder given on the command line, which holds ``models``."""
    folder = Path(sys.argv[1])
    logits = {}
    for tensor, pipeline in LAYOUTS:
        with layout_of(tensor, pipeline) as layout:
            for name in NAMES:
                case = f"{name}_{tensor}x{pipeline}"
                hf_to_megatron(folder / "models" / name, folder / case, layout)
                logits[case] = logits_of(folder / "models" / name, folder / case, layout, TOKENS)
    for index, (tensor, pipeline) in enumerate(LAYOUTS):
        written = "x".join(map(str, LAYOUTS[index - 1]))
        with layout_of(tensor, pipeline) as layout:
            for name in NAMES:
                megatron_to_hf(
                    find_checkpoint(folder / f"{name}_{written}"),
                    folder / "models" / name,
                    folder / f"{name}_{written}_hf",
                    layout,
                    bucket_bytes=BUCKET_BYTES,
                )
    if dist.get_rank() == 0:
        torch.save(logits, folder / "logits.pt")
    convert_checkpoint_of_training(folder)
    dist.destroy_process_group()


@contextmanager
def layout_of(tensor: int, pipeline: int) -> Iterator[ParallelLayout]:
    """Megatron's groups for one layout."""
    yield initialize_parallel_state(ParallelSizes(tensor, pipeline, 1, 1), seed=0)
    dist.barrier()
    destroy_model_parallel()


def convert_checkpoint_of_training(folder: Path) -> None:
    """Train in bf16 at TP2 x DP2, save and export; then convert the checkpoint at PP2."""
    source = folder / "models" / "qwen3_tied"
    with layout_of(2, 1) as layout:
        student = Student.build(
            StudentConfig(
                model_path=str(source),
                precision="bf16",
                megatron={"tensor_model_parallel_size": 2},
            ),
            OptimizerConfig(lr=1e-2, distributed=True),
            {},
            total_updates=2,
            seed=0,
        )
        student.load_hf(source)
        examples = make_examples()[layout.data_parallel_rank :: layout.data_parallel_size]
        student.train_sft_mini_batch([examples])
        student.save_checkpoint(folder / "run" / "checkpoints", 1, {})
        student.export_hf(folder / "exported")
    with layout_of(1, 2) as layout:
        checkpoint = find_checkpoint(folder / "run" / "checkpoints")
        megatron_to_hf(checkpoint, source, folder / "converted", layout, bucket_bytes=BUCKET_BYTES)


if __name__ == "__main__":
    main()
