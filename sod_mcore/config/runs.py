"""The trees of settings that programs read: distillation, fine-tuning, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from sod_mcore.config.algorithm import AlgorithmConfig, TeacherConfig
from sod_mcore.config.base import STRICT, NonNegative, Positive, Seconds
from sod_mcore.config.evaluation import BenchmarkConfig, EvaluationConfig, ReportConfig
from sod_mcore.config.rollout import (
    ChatConfig,
    DataConfig,
    RewardConfig,
    RolloutConfig,
    ToolsConfig,
)
from sod_mcore.config.serving import ServingConfig
from sod_mcore.config.training import OptimizerConfig, RunConfig, StudentConfig


@dataclass(config=STRICT, kw_only=True, frozen=True)
class SodConfig:
    """A whole run of ``pretrain_sod.py``."""

    run: RunConfig
    student: StudentConfig
    data: DataConfig
    serving: ServingConfig | None = None
    """The engines; may be left out with run.replay."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    ddp: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron-Core's DistributedDataParallelConfig, by their own names."""
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    tools: ToolsConfig = Field(default_factory=ToolsConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    chat: ChatConfig = Field(default_factory=ChatConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @property
    def serving_directory(self) -> Path:
        """Folder of the engines' addresses."""
        shared = self.serving.directory if self.serving is not None else None
        return Path(shared or self.run.directory)

    @property
    def is_colocated(self) -> bool:
        """Whether the engines share the trainer's GPUs, and sleep while it works."""
        return self.serving is not None and self.serving.placement == "colocated"

    @property
    def probe_tolerance(self) -> float:
        """Allowed difference between trainer and engine on the probe, nats."""
        given = self.serving.probe_tolerance if self.serving is not None else None
        return given or (1e-3 if self.student.precision == "fp32" else 0.2)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of the loss reads the teacher's scores."""
        return self.algorithm.needs_teacher

    @property
    def averages_weights(self) -> bool:
        """Whether the teacher is an average of the student's weights."""
        return self.needs_teacher and self.teacher.weights == "average"


@dataclass(config=STRICT, kw_only=True, frozen=True)
class SftDataConfig:
    """Conversations for supervised fine-tuning."""

    train: str
    """Parquet file of conversations (columns messages, tools, optional enable_thinking)."""
    max_tokens: Positive = 32768
    """Longest conversation; longer ones are refused at start."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class SftTrainingConfig:
    """Length of supervised fine-tuning."""

    directory: str
    """Folder for checkpoints and metrics."""
    export: str
    """Hugging Face folder that receives the result."""
    updates: Positive
    """Optimizer updates."""
    batch_size: Positive = 128
    """Conversations an update."""
    seed: int = 1
    """Seeds data order and Megatron's random state."""
    save_every: NonNegative = 0
    """Updates between checkpoints; 0 saves none before the end."""
    max_seconds: Seconds | None = None
    """End after this wall time even if updates remain; null for no limit."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class SftConfig:
    """A whole run of ``scripts/train_sft.py``."""

    sft: SftTrainingConfig
    student: StudentConfig
    data: SftDataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    ddp: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron-Core's DistributedDataParallelConfig, by their own names."""
    chat: ChatConfig = Field(default_factory=ChatConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)


@dataclass(config=STRICT, kw_only=True, frozen=True)
class EvalConfig:
    """A whole run of ``python -m sod_mcore.evaluation``."""

    evaluation: BenchmarkConfig
    serving: ServingConfig
    """The model is serving.student: a folder that is served for the run, or with addresses the
    engines that serve it already. Teachers are not started."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    tools: ToolsConfig = Field(default_factory=ToolsConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    chat: ChatConfig = Field(default_factory=ChatConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @property
    def serving_directory(self) -> Path:
        """Folder of the engines' addresses."""
        return Path(self.serving.directory or self.evaluation.output)
