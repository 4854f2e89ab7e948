"""The learning-rate schedule, against its formula."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from sod_mcore.config import ConfigError, OptimizerConfig
from sod_mcore.student.optimizer import build_schedule


def rates(config: OptimizerConfig, total_updates: int) -> list[float]:
    """The learning rate of each update of a run."""
    optimizer: Any = SimpleNamespace(
        param_groups=[{"lr": 0.0, "weight_decay": 0.0, "wd_mult": 1.0}]
    )
    schedule = build_schedule(config, optimizer, total_updates)
    result = []
    for _ in range(total_updates):
        result.append(optimizer.param_groups[0]["lr"])
        schedule.step(1)
    return result


def test_constant_after_warm_up() -> None:
    config = OptimizerConfig(lr=4.0, warmup_updates=4)
    assert rates(config, 6) == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]


def test_linear_decay_never_wastes_an_update() -> None:
    config = OptimizerConfig(lr=5.0, schedule="linear")
    assert rates(config, 4) == pytest.approx([4.0, 3.0, 2.0, 1.0])


def test_cosine_decay_to_the_minimum() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, schedule="cosine", warmup_updates=2)
    course = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates(config, 5) == pytest.approx([0.5, *course])


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_updates is 5.*below the run's 5"):
        rates(OptimizerConfig(warmup_updates=5), 5)
