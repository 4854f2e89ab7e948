"""Logits of a converted model, stage by stage, without the package's training schedule.

Also those of Megatron-LM's own models, so nothing here depends on how a model was built.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from sod_mcore.student.architecture import read_architecture
from sod_mcore.student.conversion.convert import build_bare_model
from sod_mcore.student.conversion.megatron_checkpoint import find_checkpoint, read_weights
from sod_mcore.student.model import GPTModel
from sod_mcore.student.parallel_state import ParallelLayout


def logits_of(
    source: Path, converted: Path, layout: ParallelLayout, tokens: torch.Tensor
) -> torch.Tensor:
    """Float32 logits ``[batch, length, vocab]`` on rank 0; what other ranks return means nothing.

    Args:
        source: Hugging Face folder with the configuration.
        converted: checkpoint with the weights.
        tokens: int64 ``[batch, length]``.
    """
    architecture = read_architecture(source)
    model = build_bare_model(source, architecture, layout, torch.float32)
    read_weights(model, architecture, find_checkpoint(converted))
    return gathered_logits(model, architecture.vocab_size, layout, tokens)


def gathered_logits(
    model: GPTModel, vocab_size: int, layout: ParallelLayout, tokens: torch.Tensor
) -> torch.Tensor:
    """Float32 logits ``[batch, length, vocab]`` on rank 0; what other ranks return means nothing.

    Args:
        vocab_size: columns without those that pad the vocabulary.
        tokens: int64 ``[batch, length]``.
    """
    tensor_group, stages = groups()
    logits = forward(model, layout, stages, tokens)
    if layout.is_last_stage:
        shards = [torch.empty_like(logits) for _ in range(layout.tensor_parallel_size)]
        dist.all_gather(shards, logits.contiguous(), group=tensor_group)
        logits = torch.cat(shards, dim=-1)[..., :vocab_size].contiguous()
    # Replica 0's last stage ends at rank 0 unless there is one stage.
    if layout.pipeline_parallel_size == 1:
        return logits
    if layout.is_last_stage:
        dist.send(logits, group=stages, group_dst=0)
    elif layout.is_first_stage:
        logits = torch.empty(*tokens.shape, vocab_size)
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
def forward(
    model: GPTModel, layout: ParallelLayout, stages: dist.ProcessGroup, tokens: torch.Tensor
) -> torch.Tensor:
    """This stage's output; stages hand it on in order."""
    stage = layout.pipeline_parallel_rank
    if not layout.is_first_stage:
        hidden = torch.empty(tokens.shape[1], tokens.shape[0], model.config.hidden_size)
        dist.recv(hidden, group=stages, group_src=stage - 1)
        model.set_input_tensor(hidden)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    output: torch.Tensor = model(tokens, positions, None)
    if not layout.is_last_stage:
        dist.send(output.contiguous(), group=stages, group_dst=stage + 1)
    return output
