"""Which rollout pool a run has, and what would keep it from starting."""

from __future__ import annotations

from sod_mcore.config import ConfigError, RolloutConfig
from sod_mcore.ray_cluster.settings import check_address, check_installed, usable_cpus
from sod_mcore.rollout.pool import PoolSettings, RolloutPool, SpanListener
from sod_mcore.rollout.process_pool import ProcessPool


def open_pool(settings: PoolSettings, on_spans: SpanListener = lambda spans: None) -> RolloutPool:
    """Start the pool that ``rollout.pool`` names, and wait until it can play.

    Args:
        settings: what the pool needs to know.
        on_spans: hears what was done when, in calls of the pool's own.

    Raises:
        ConfigError: the Ray cluster cannot be joined, or is too small.
        RolloutError: the pool did not start, with its own words for why.
    """
    if settings.rollout.pool == "process":
        return ProcessPool(settings, on_spans)
    from sod_mcore.rollout.on_ray.ray_pool import (
        RayPool,  # loads Ray, which the process pool does without
    )

    return RayPool(settings, on_spans)


def check_pool(rollout: RolloutConfig) -> None:
    """Find what is wrong with the settings of the pool, on the machine that will open it.

    Raises:
        ConfigError: one line, whatever it is.
    """
    if rollout.pool == "process":
        if rollout.ray_address is not None:
            raise ConfigError(
                f"rollout.ray_address is {rollout.ray_address}, but rollout.pool is process; set "
                "that to ray, or leave the address out"
            )
        return
    check_installed("rollout.pool", "rollout.pool=process")
    if rollout.concurrency < rollout.ray_actors:
        raise ConfigError(
            f"rollout.concurrency is {rollout.concurrency}, shared by rollout.ray_actors="
            f"{rollout.ray_actors}, and each needs at least one; raise it, or have fewer actors"
        )
    if rollout.ray_address is None:
        _check_own_cpus(rollout)
    else:
        check_address("rollout.ray_address", rollout.ray_address, "auto, or null")


def _check_own_cpus(rollout: RolloutConfig) -> None:
    wanted, here = rollout.ray_actors * rollout.ray_actor_cpus, usable_cpus()
    if wanted > here:
        raise ConfigError(
            f"rollout.ray_actors={rollout.ray_actors} with rollout.ray_actor_cpus="
            f"{rollout.ray_actor_cpus:g} each reserve {wanted:g} CPUs; this machine has {here}: "
            "lower one of them, or join a cluster with rollout.ray_address"
        )
