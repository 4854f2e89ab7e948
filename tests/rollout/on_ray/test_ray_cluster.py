"""Three nodes of a real Ray on one machine, one of which is killed while it plays."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.config import ConfigError
from sod_mcore.rollout.on_ray.ray_handle import RayHandle
from sod_mcore.rollout.open_pool import check_pool, open_pool
from sod_mcore.rollout.pool import PoolSettings, RolloutError
from sod_mcore.rollout.request import RolloutProgress
from tests.ray_cluster.clusters import started_cluster
from tests.rollout.input_engine import InputEngine, pool_settings, served, sums, write_fleet
from tests.rollout.test_pools_alike import assert_same

PATIENCE = 300.0
"""Seconds for what takes a few on an idle machine."""
NODES = 3
FAST = ("0+5=", "1+4=", "2+3=")
"""Questions that are answered at once, one of each actor; the others are held."""
REQUEST = sums(12, samples=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes with room for two actors each, on the loopback interface."""
    with started_cluster(node_options()) as started:
        for _ in range(NODES - 1):
            started.add_node(**node_options())
        yield started


def node_options() -> dict[str, Any]:
    return {"num_cpus": 2, "node_ip_address": "127.0.0.1", "include_dashboard": False}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[InputEngine]:
    """Holds what is not fast, and is found by pools of ``tmp_path``."""
    engine = InputEngine(holds=is_slow)
    with served(engine) as url:
        write_fleet(tmp_path, url)
        yield engine


def is_slow(text: str) -> bool:
    return not any(question in text for question in FAST)


def settings_for(cluster: Any, folder: Path, **rollout: Any) -> PoolSettings:
    joining = {"pool": "ray", "ray_address": cluster.address, "ray_actors": NODES}
    settings = pool_settings(folder, {**joining, **rollout})
    check_pool(settings.rollout)
    return settings


def nodes_of_actors() -> list[str]:
    """The node of each living actor of this client."""
    from ray._private import state

    actors = [actor for actor in state.actors().values() if actor["State"] == "ALIVE"]
    return [actor["Address"]["NodeID"] for actor in actors]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_node_is_killed_in_the_middle(cluster: Any, engine: InputEngine, tmp_path: Path) -> None:
    """Every prompt is there once with all its samples, and the counters tell what happened."""
    progress: list[RolloutProgress] = []
    with (
        ThreadPoolExecutor(1) as executor,
        open_pool(settings_for(cluster, tmp_path)) as pool,
    ):
        assert len(set(nodes_of_actors())) == NODES, "the actors are spread"
        collected = executor.submit(pool.collect, pool.submit(REQUEST), PATIENCE, progress.append)
        until(lambda: bool(progress) and progress[-1].finished == 2 * NODES)
        until(lambda: len(engine.held) == REQUEST.num_trajectories - 2 * NODES)
        victim = next(n for n in cluster.worker_nodes if n.node_id in nodes_of_actors())
        cluster.remove_node(victim, allow_graceful=False)
        until(lambda: len(nodes_of_actors()) == NODES and victim.node_id not in nodes_of_actors())
        engine.release()
        result = collected.result(PATIENCE)
        again = pool.collect(pool.submit(REQUEST), PATIENCE)
    cluster.add_node(**node_options())

    counted = Counter(t.group_id for t in result.trajectories)
    assert list(counted.items()) == [(prompt.prompt_id, 2) for prompt in REQUEST.prompts]
    # Each actor had four groups, of which one was back: three were played again.
    assert (result.num_dropped, result.num_unscored, result.num_retries) == (0, 0, 3 * 2)
    (failure,) = result.failures
    assert failure.startswith("rollout actor ")
    assert " died: " in failure
    assert progress[-1] == RolloutProgress(24, 0, 24)
    assert (again.num_retries, again.failures) == (0, ())
    for found, expected in zip(result.trajectories, again.trajectories, strict=True):
        assert_same(found, expected)
        assert found.token_ids.flags.writeable


def test_a_pool_starts_beside_a_node_that_has_just_died(
    cluster: Any, engine: InputEngine, tmp_path: Path
) -> None:
    """Ray sends actors there until it has noticed."""
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    try:
        with open_pool(settings_for(cluster, tmp_path)) as pool:
            engine.release()
            assert len(pool.collect(pool.submit(sums(4)), PATIENCE).trajectories) == 8
    finally:
        cluster.add_node(**node_options())


def test_what_an_actor_loses_too_often_is_dropped(
    cluster: Any, engine: InputEngine, tmp_path: Path
) -> None:
    progress: list[RolloutProgress] = []
    with (
        ThreadPoolExecutor(1) as executor,
        open_pool(settings_for(cluster, tmp_path, ray_actors=1, attempts=1)) as pool,
    ):
        ticket = pool.submit(sums(4))
        collected = executor.submit(pool.collect, ticket, PATIENCE, progress.append)
        until(lambda: bool(progress) and progress[-1].finished == 6)
        until(lambda: len(engine.held) == 2)
        kill_actors()
        result = collected.result(PATIENCE)
        engine.release()
        assert len(pool.collect(pool.submit(sums(4)), PATIENCE).trajectories) == 8
    assert {t.group_id for t in result.trajectories} == {"p0", "p1", "p2"}
    assert (result.num_dropped, result.num_retries) == (2, 0)


def kill_actors() -> None:
    """Kill the processes of this client's actors."""
    from ray._private import state

    for actor in state.actors().values():
        if actor["State"] == "ALIVE":
            os.kill(actor["Pid"], signal.SIGKILL)


def test_spare_prompts_are_aborted_on_the_engine(
    cluster: Any, engine: InputEngine, tmp_path: Path
) -> None:
    with open_pool(settings_for(cluster, tmp_path)) as pool:
        engine.holds = lambda text: True
        ticket = pool.submit(sums(3, spare=3))
        until(lambda: len(engine.held) == 12)
        engine.holds = is_slow
        result = pool.collect(ticket, PATIENCE)
        assert {t.group_id for t in result.trajectories} == {"p0", "p1", "p2"}
        assert result.num_cancelled == 6
        assert len(engine.aborted) == 6


def test_a_cluster_that_is_too_small_is_refused(cluster: Any, tmp_path: Path) -> None:
    settings = settings_for(cluster, tmp_path, ray_actor_cpus=20.0)
    with pytest.raises(ConfigError, match="each reserve 60 CPUs; the Ray cluster has 6: lower"):
        open_pool(settings)


def test_no_room_in_time_is_one_clear_error(
    cluster: Any, engine: InputEngine, tmp_path: Path
) -> None:
    """All CPUs are there, but others have taken them."""
    settings = settings_for(cluster, tmp_path, ray_actors=2, ray_actor_cpus=2.0)
    with open_pool(settings):
        handle = RayHandle(settings, 2), RayHandle(settings, 3)

        async def wait_for_places() -> None:
            await asyncio.gather(*(h.wait_for_place(PATIENCE) for h in handle[:1]))
            await handle[1].wait_for_place(2.0)

        with pytest.raises(RolloutError, match=r"no node .* within 2 s: it reserves 2 CPUs"):
            asyncio.run(wait_for_places())


def test_services_that_do_not_start_are_told_in_words(cluster: Any, tmp_path: Path) -> None:
    """There is no engine in this folder."""
    with pytest.raises(RolloutError, match="rollout pool: FleetError: there are no engines"):
        open_pool(settings_for(cluster, tmp_path))
