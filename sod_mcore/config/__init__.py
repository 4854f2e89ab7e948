"""Every setting of a run: one tree of typed sections, from YAML, overridden by ``key=value``.

The docstring under a field is its documentation: ``--help`` and ``docs/config_reference.yaml`` are
generated from it. Sections named ``student.megatron``, ``optimizer.megatron`` and ``ddp`` carry
Megatron-Core's own field names through; ``student/`` checks those names before anything is built.
"""

from sod_mcore.config.algorithm import AlgorithmConfig, TeacherConfig, TopKConfig
from sod_mcore.config.base import (
    HUB_PREFIX,
    STRICT,
    ConfigError,
    Fraction,
    NonNegative,
    Positive,
    Seconds,
)
from sod_mcore.config.evaluation import BenchmarkConfig, EvaluationConfig, ReportConfig
from sod_mcore.config.rollout import (
    ChatConfig,
    DataConfig,
    RewardConfig,
    RolloutConfig,
    ToolsConfig,
)
from sod_mcore.config.runs import (
    EvalConfig,
    SftConfig,
    SftDataConfig,
    SftTrainingConfig,
    SodConfig,
)
from sod_mcore.config.serving import EngineConfig, ServingConfig, serving_field
from sod_mcore.config.training import OptimizerConfig, RunConfig, StudentConfig

__all__ = [
    "HUB_PREFIX",
    "STRICT",
    "AlgorithmConfig",
    "BenchmarkConfig",
    "ChatConfig",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "EvaluationConfig",
    "Fraction",
    "NonNegative",
    "OptimizerConfig",
    "Positive",
    "ReportConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Seconds",
    "ServingConfig",
    "SftConfig",
    "SftDataConfig",
    "SftTrainingConfig",
    "SodConfig",
    "StudentConfig",
    "TeacherConfig",
    "ToolsConfig",
    "TopKConfig",
    "serving_field",
]
