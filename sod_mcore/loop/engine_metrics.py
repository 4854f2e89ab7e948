"""What went wrong between the rollout pool and the engines since the last line of metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.rollout.pool import RolloutPool
from sod_mcore.serving.client.counters import ClientCounters


class EngineMetrics:
    """Turns totals into numbers of a line; used by global rank 0.

    Args:
        pool: tells of its requests, by model.
        watch: tells of restarts.
    """

    def __init__(self, pool: RolloutPool, watch: EngineWatch) -> None:
        self._pool = pool
        self._watch = watch
        self._before: dict[str, float] = {}

    def since_last_line(self) -> dict[str, float]:
        """``serving/restarts`` and ``serving/<model>/<counter>``: what was added since last time.

        The counters are those of :class:`ClientCounters`. The pool tells of them when a batch is
        done, so a batch under way counts where it ends.
        """
        now = _totals(self._pool.counters) | {"serving/restarts": float(self._watch.restarts())}
        added = {name: value - self._before.get(name, 0.0) for name, value in now.items()}
        self._before = now
        return added


def _totals(counters: Mapping[str, ClientCounters]) -> dict[str, float]:
    return {
        f"serving/{model}/{name}": float(value)
        for model, of_model in counters.items()
        for name, value in dataclasses.asdict(of_model).items()
    }
