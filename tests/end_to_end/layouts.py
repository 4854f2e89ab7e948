"""One update of ``pretrain_sod.py`` on a recorded batch, by configuration alone, and its gradient.

The gradient is read from the exported weights: with weight decay and clipping off and an epsilon
that dwarfs every gradient, Adam's first update is ``-lr / epsilon * gradient``. The factor is so
large that the old weights, and the rounding that comes with them, vanish in the new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.programs import metrics, run, torchrun, write_config

ADAM_EPSILON = 1e9
UPDATE_FACTOR = 1e6
"""Learning rate over epsilon. Gradients of 1e-3 move weights by 1e3."""

RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True)
class LayoutCase:
    """One way to compute the same update.

    Attributes:
        objective: which of the test's objectives it trains on.
        micro_batch_tokens: 16384 holds the whole batch in one micro-batch.
        lm_head: all logits at once, or those of 100 tokens at a time.
        ops: the compiled operations, or those in eager torch.
    """

    name: str
    objective: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    distributed_optimizer: bool = False
    packing: str = "packed"
    micro_batch_tokens: int = 16384
    precision: str = "fp32"
    lm_head: str = "full"
    ops: str = "fused"
    ddp: Mapping[str, Any] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Ranks of the launch."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        sizes = {"TP": self.tensor, "PP": self.pipeline, "DP": self.data}
        parts = [" x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "TP1"]
        parts += ["sequence parallel"] * self.sequence_parallel
        parts += ["recompute"] * self.recompute
        parts += ["distributed optimizer"] * self.distributed_optimizer
        parts += ["overlapped communication"] * bool(self.ddp)
        parts += ["chunked output layer"] * (self.lm_head == "chunked")
        parts += ["eager operations"] * (self.ops == "eager")
        parts += [self.packing, f"{self.micro_batch_tokens} tokens", self.precision, self.objective]
        return ", ".join(parts)


@dataclass(frozen=True)
class Update:
    """What one update reported, and its gradient under Hugging Face's names, float64."""

    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]


def run_update(
    case: LayoutCase,
    live_run: LiveRun,
    student: Path,
    algorithm: Mapping[str, Any],
    folder: Path,
) -> Update:
    """Train ``student`` for one update on the first batch that ``live_run`` recorded."""
    export = folder / "updated"
    tree: dict[str, Any] = {
        "run": {"directory": str(folder / "run"), "steps": 1, "export": str(export)},
        "student": _student_section(case, student),
        "data": live_run.tree["data"],
        "optimizer": {
            "lr": ADAM_EPSILON * UPDATE_FACTOR,
            "weight_decay": 0.0,
            "clip_grad": 0.0,
            "distributed": case.distributed_optimizer,
            "megatron": {"adam_eps": ADAM_EPSILON},
        },
        "ddp": dict(case.ddp),
        "algorithm": dict(algorithm),
        "report": {"wandb": "disabled"},
    }
    config = write_config(folder / "layout.yaml", tree)
    batch = live_run.recordings / "step_000000.npz"
    command = torchrun(case.processes, "pretrain_sod.py", str(config), "--replay", str(batch))
    run(command, variables={"SOD_OPS": case.ops})
    before, after = (load_file(path / "model.safetensors") for path in (student, export))
    return Update(
        metrics=metrics(folder / "run")[-1],
        gradients={
            name: (before[name].double() - after[name].double()) / UPDATE_FACTOR for name in before
        },
    )


def _student_section(case: LayoutCase, folder: Path) -> dict[str, Any]:
    megatron: dict[str, Any] = {
        "tensor_model_parallel_size": case.tensor,
        "pipeline_model_parallel_size": case.pipeline,
    }
    if case.sequence_parallel:
        megatron["sequence_parallel"] = True
    if case.recompute:
        megatron |= RECOMPUTE
    return {
        "model_path": str(folder),
        "precision": case.precision,
        "packing": case.packing,
        "micro_batch_tokens": case.micro_batch_tokens,
        "lm_head": case.lm_head,
        "lm_head_chunk_rows": 100,
        "megatron": megatron,
    }
