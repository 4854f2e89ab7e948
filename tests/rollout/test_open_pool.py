"""Settings of the pool that cannot work are refused before anything starts."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from sod_mcore.config import ConfigError, RolloutConfig
from sod_mcore.ray_cluster.settings import usable_cpus
from sod_mcore.rollout.open_pool import check_pool


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"pool": "process", "ray_address": "auto"}, "ray_address is auto, but .*set that to ray"),
        ({"ray_actors": 8, "concurrency": 4}, r"concurrency is 4, shared by rollout\.ray_actors=8"),
        ({"ray_actor_cpus": 1e6}, r"each reserve 1e\+06 CPUs; this machine has"),
        ({"ray_address": "ray://127.0.0.1:10001"}, "not the cluster's own address; give"),
        ({"ray_address": "127.0.0.1"}, "give host:port, auto, or null"),
        ({"ray_address": "127.0.0.1:many"}, "give host:port, auto, or null"),
        ({"ray_address": "127.0.0.1:9"}, "nothing answers .*; start the cluster"),
    ],
)
def test_wrong_settings_are_one_line_with_the_mend(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^rollout\.[^\n]*{problem}[^\n]*$"):
        check_pool(RolloutConfig(**{"pool": "ray", **settings}))


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ray is not installed; pip install 'sod_mcore\[ray\]'"):
        check_pool(RolloutConfig(pool="ray"))


@pytest.mark.parametrize(
    "settings",
    [
        {"pool": "process"},
        {"pool": "ray", "ray_actors": usable_cpus()},
        {"pool": "ray", "ray_actors": 3, "ray_actor_cpus": 0.0},
        {"pool": "ray", "ray_address": "auto", "ray_actors": 100, "ray_actor_cpus": 8.0},
    ],
)
def test_settings_that_may_work_pass(settings: dict[str, Any]) -> None:
    check_pool(RolloutConfig(**settings))
