"""What the pools of one evaluation are given to share."""

from pathlib import Path

import pytest

from sod_mcore.config import (
    BenchmarkConfig,
    EngineConfig,
    EvalConfig,
    RewardConfig,
    RolloutConfig,
    ServingConfig,
    ToolsConfig,
)
from sod_mcore.evaluation.benchmark import pool_settings


@pytest.mark.parametrize("total_memory_mb", [None, 1001])
def test_pools_together_keep_to_the_limits_of_one(
    tmp_path: Path, total_memory_mb: int | None
) -> None:
    config = EvalConfig(
        evaluation=BenchmarkConfig(data="aime.parquet", output=str(tmp_path)),
        serving=ServingConfig(student=EngineConfig(model_path="model")),
        rollout=RolloutConfig(concurrency=10),
        tools=ToolsConfig(workers=4, total_memory_mb=total_memory_mb),
        reward=RewardConfig(workers=2, code_workers=6),
    )
    one, two = (pool_settings(config, ("AIME2024",), count) for count in (1, 2))
    assert (one.rollout, one.tools, one.reward) == (config.rollout, config.tools, config.reward)
    assert two.rollout.concurrency == 5
    assert (two.tools.workers, two.reward.workers, two.reward.code_workers) == (2, 1, 3)
    assert two.tools.total_memory_mb == (None if total_memory_mb is None else 500)
    assert two.sources == ("AIME2024",)
