"""Which rollout pool a run has."""

from __future__ import annotations

from sod_mcore.rollout.pool import PoolSettings, RolloutPool
from sod_mcore.rollout.process_pool import ProcessPool


def open_pool(settings: PoolSettings) -> RolloutPool:
    """Start the pool, and wait until it can play.

    Raises:
        RolloutError: the pool did not start, with its own words for why.
    """
    return ProcessPool(settings)
