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
from sod_mcore.student.architecture import read_architecture
from sod_mcore.student.conversion.convert import (
    build_bare_model,
    hf_to_megatron,
    megatron_to_hf,
)
from sod_mcore.student.conversion.megatron_checkpoint import find_checkpoint, read_weights
from sod_mcore.student.model import GPTModel
from sod_mcore.student.model_config import ParallelSizes
from sod_mcore.student.parallel_state import (
    ParallelLayout,
    destroy_model_parallel,
    initialize_parallel_state,
)
from sod_mcore.student.student import Student
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
                logits[case] = compute_logits(folder / "models" / name, folder / case, layout)
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


def compute_logits(source: Path, converted: Path, layout: ParallelLayout) -> torch.Tensor | None:
    """Logits ``[batch, length, vocab]`` of :data:`TOKENS` on global rank 0."""
    architecture = read_architecture(source)
    model = build_bare_model(source, architecture, layout, torch.float32)
    read_weights(model, architecture, find_checkpoint(converted))
    tensor_group, stages = groups()
    logits = forward(model, layout, stages)
    if layout.is_last_stage:
        shards = [torch.empty_like(logits) for _ in range(layout.tensor_parallel_size)]
        dist.all_gather(shards, logits.contiguous(), group=tensor_group)
        logits = torch.cat(shards, dim=-1)[..., : architecture.vocab_size].contiguous()
    # Replica 0's last stage ends at rank 0 unless there is one stage.
    if layout.pipeline_parallel_size == 1:
        return logits
    if layout.is_last_stage:
        dist.send(logits, group=stages, group_dst=0)
    elif layout.is_first_stage:
        logits = torch.empty(*TOKENS.shape, architecture.vocab_size)
        dist.recv(logits, group=stages, group_src=layout.pipeline_parallel_size - 1)
    return logits


def groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Tensor-parallel and pipeline group of this rank."""
    from megatron.core import parallel_state  # sod_mcore.student, imported above, prepares it

    return (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    )


@torch.no_grad()
def forward(model: GPTModel, layout: ParallelLayout, stages: dist.ProcessGroup) -> torch.Tensor:
    """This stage's output; stages hand it on in order."""
    stage = layout.pipeline_parallel_rank
    if not layout.is_first_stage:
        hidden = torch.empty(TOKENS.shape[1], TOKENS.shape[0], model.config.hidden_size)
        dist.recv(hidden, group=stages, group_src=stage - 1)
        model.set_input_tensor(hidden)
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    output: torch.Tensor = model(TOKENS, positions, None)
    if not layout.is_last_stage:
        dist.send(output.contiguous(), group=stages, group_dst=stage + 1)
    return output


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
