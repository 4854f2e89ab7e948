"""Counters of a run become numbers of a step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from sod_mcore.loop.engine_metrics import EngineMetrics
from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.rollout.pool import RolloutPool
from sod_mcore.serving.client.counters import ClientCounters
from sod_mcore.serving.fleet.state import FleetStateFile


def test_each_line_has_what_was_added(tmp_path: Path) -> None:
    pool = SimpleNamespace(counters={})
    watch = EngineWatch(tmp_path, patience_seconds=0.0)
    metrics = EngineMetrics(cast(RolloutPool, pool), watch)
    assert metrics.since_last_line() == {"serving/restarts": 0.0}
    fleet = FleetStateFile(tmp_path)
    fleet.record("student_engine_0", "student", "engine", "http://a:1", "ready", 2)
    pool.counters = {"student": ClientCounters(requests=10, retries=3, seconds_waited=0.5)}
    first = metrics.since_last_line()
    assert first["serving/restarts"] == 2.0
    assert first["serving/student/requests"] == 10.0
    assert first["serving/student/seconds_waited"] == 0.5
    pool.counters = {"student": ClientCounters(requests=15, retries=3, seconds_waited=2.0)}
    second = metrics.since_last_line()
    assert second["serving/restarts"] == second["serving/student/retries"] == 0.0
    assert second["serving/student/requests"] == 5.0
    assert second["serving/student/seconds_waited"] == 1.5
