"""Settings of training itself: length and place of a run, the student, the optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sod_mcore.config.base import STRICT, NonNegative, Positive, Seconds


@dataclass(config=STRICT, kw_only=True, frozen=True)
class RunConfig:
    """Length, place and bookkeeping of the run."""

    directory: str
    """Folder for everything the run writes: checkpoints, weights, logs, metrics."""
    steps: Positive = 100
    """Training steps; one step is one rollout batch."""
    seed: int = 1
    """Seeds data order, mini-batch assignment and Megatron's random state."""
    save_every: NonNegative = 10
    """Steps between checkpoints; 0 saves only at the end or when stopped."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept; older ones are deleted after a new one is complete."""
    resume: Literal["auto", "never"] = "auto"
    """"auto" continues from the newest complete checkpoint in ``directory``."""
    export: str | None = None
    """Hugging Face folder that receives the final weights; null exports none."""
    record: str | None = None
    """Folder that receives each step's trajectories as a recorded batch."""
    replay: str | None = None
    """Recorded batch (or folder of them) to train on, without any engine."""
    stop_file: str | None = None
    """When this file appears the run saves a checkpoint and ends; default: directory/stop."""
    stop_grace_seconds: Seconds = 20.0
    """Time from SIGINT or SIGTERM until a rank that has not ended is ended by force. torchrun kills
    after 30 s; for steps longer than this raise both (torchrun --shutdown-timeout), or use the
    stop file, which has no limit."""
    collective_timeout_seconds: Seconds = 600.0
    """Longest time that ranks wait for each other in training; rollouts have their own deadline."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class StudentConfig:
    """The model that is trained."""

    model_path: str
    """Hugging Face folder: weights to start from, architecture, tokenizer, chat template."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute precision; bf16 keeps float32 main parameters in the optimizer."""
    packing: Literal["packed", "padded"] = "packed"
    """How trajectories share a micro-batch: end to end in one row, or one row each with padding."""
    micro_batch_tokens: Positive = 16384
    """Upper bound of tokens a micro-batch (padding included); a longer trajectory gets its own."""
    lm_head: Literal["full", "chunked"] = "full"
    """Output layer and loss: "full" has the logits of a micro-batch's loss tokens at once and
    overwrites them by their gradient; "chunked" has those of lm_head_chunk_rows tokens at a time,
    which saves memory from some thousand tokens on (docs/fused_op.md)."""
    lm_head_chunk_rows: Positive = 1024
    """Tokens whose logits "chunked" holds at a time."""
    lm_head_dtype: Literal["bf16", "fp32"] | None = None
    """Precision of the logits; null takes the model's. fp32 logits of a bf16 model need lm_head:
    chunked; on both sides they brought the mean gap of trainer and engine from 0.036 to 0.024 nats
    a token (135M parameters, docs/fused_op.md)."""
    transformer_implementation: Literal["auto", "transformer_engine", "local"] = "auto"
    """Whose transformer layers: "auto" takes Transformer Engine's where they can be used (it is
    installed, CUDA is there, precision is bf16), else Megatron's own with torch's attention."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron-Core's TransformerConfig / ModelParallelConfig, by their own names, for
    example tensor_model_parallel_size, pipeline_model_parallel_size, sequence_parallel."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class OptimizerConfig:
    """Learning rate schedule, and Megatron-Core's optimizer."""

    lr: Annotated[float, Field(ge=0)] = 1e-6
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after warm-up; the horizon is all optimizer updates of the run."""
    warmup_updates: NonNegative = 0
    """Optimizer updates of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    distributed: bool = False
    """Shard the optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Further fields of Megatron-Core's OptimizerConfig, by their own names."""
