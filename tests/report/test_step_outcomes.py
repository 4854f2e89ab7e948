"""Divergence and weight of steps by what became of their tool calls."""

import numpy as np
import pytest

from sod_mcore.report.step_outcomes import metrics_by_outcome


def test_each_step_counts_for_its_own_call_and_for_the_one_before() -> None:
    d, w = np.array([0.1, 0.5, 0.3], np.float32), np.array([1.0, 0.2, 0.4], np.float32)
    metrics = metrics_by_outcome([((False, True), d, w)])
    assert metrics == pytest.approx(
        {
            "distillation/d_k/call_failed": 0.1,
            "distillation/w_k/call_failed": 1.0,
            "distillation/steps/call_failed": 1,
            "distillation/d_k/call_succeeded": 0.5,
            "distillation/w_k/call_succeeded": 0.2,
            "distillation/steps/call_succeeded": 1,
            "distillation/d_k/after_failure": 0.5,
            "distillation/w_k/after_failure": 0.2,
            "distillation/steps/after_failure": 1,
            "distillation/d_k/no_call": 0.3,
            "distillation/w_k/no_call": 0.4,
            "distillation/steps/no_call": 1,
        }
    )


def test_means_are_over_steps_of_all_trajectories() -> None:
    one = ((True,), np.array([0.2, 0.4], np.float32), np.ones(2, np.float32))
    two = ((), np.array([0.6], np.float32), np.zeros(1, np.float32))
    metrics = metrics_by_outcome([one, two])
    assert metrics["distillation/d_k/no_call"] == pytest.approx(0.5)
    assert metrics["distillation/w_k/no_call"] == pytest.approx(0.5)
    assert metrics["distillation/steps/no_call"] == 2
    assert not any("failed" in name or "failure" in name for name in metrics)


def test_nothing_at_all() -> None:
    assert metrics_by_outcome([]) == {}
