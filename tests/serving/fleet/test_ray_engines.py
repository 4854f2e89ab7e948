"""Real engines on a Ray node of this machine, and what becomes of a fleet whose Ray is gone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sod_mcore.rollout.on_ray.ray_cluster import LocalRay
from sod_mcore.serving.endpoints import endpoints_path
from sod_mcore.serving.fleet.probe import probe_token_ids
from sod_mcore.serving.weights.update import probe_logprobs, weight_versions
from tests.serving.conftest import START_SECONDS, sglang_python
from tests.serving.fleet import test_lifecycle
from tests.serving.fleet.test_lifecycle import Setup, setup
from tests.serving.fleet.test_restarts import group_of, wait_for_state
from tests.serving.processes import leader_at, wait_until_gone
from tests.serving.ray_nodes import actor_of, left_of
from tests.serving.tiny_models import save_model

__all__ = ["setup"]

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture
def local_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalRay]:
    """One node on the loopback interface, which lets nobody in without its token."""
    cluster = LocalRay(tmp_path / "ray.log")
    try:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        yield cluster
    finally:
        cluster.close()


def use(setup: Setup, cluster: LocalRay) -> None:
    setup.settings["serving"] |= {"engines_on": "ray", "ray_address": cluster.address}


def test_real_engines_in_ray_actors_score_the_probe(
    local_ray: LocalRay, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is killed and loads its folder again; another goes with its actor."""
    monkeypatch.setattr(test_lifecycle, "SECONDS", START_SECONDS)
    use(setup, local_ray)
    folders = {name: save_model(setup.folder / f"tiny_{name}", seed) for seed, name in MODELS}
    settings = setup.settings["serving"]
    settings |= {"python": sglang_python(), "start_timeout_seconds": START_SECONDS}
    for name, folder in folders.items():
        settings[name] = {"model_path": str(folder)}
    with setup.serve() as serving:
        endpoints = serving.wait_until_served()
        ids = probe_token_ids(endpoints.model("student").vocab_size)

        def scores(model: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            return probe_logprobs(endpoints, model, ids, 60.0)[0, 1:]

        before = {name: scores(name) for name in folders}
        assert np.abs(before["student"] - before["teacher"]).max() > 0.01
        for name, kill_actor in (("student", False), ("teacher", True)):
            url = endpoints.model(name).engines[0]
            leader = leader_at(os.getpid(), url)
            group = group_of(leader)
            assert len(group) > 1, "SGLang's scheduler and detokenizer"
            os.kill(actor_of(leader) if kill_actor else leader, signal.SIGKILL)
            wait_for_state(serving, f"{name}_engine_0", "ready", 1)
            assert not wait_until_gone(group, 0)
            assert weight_versions(endpoints, name, 60.0) == (0,)
            np.testing.assert_allclose(scores(name), before[name], atol=1e-3)
        serving.process.send_signal(signal.SIGTERM)
        assert serving.wait() == 0
    assert not wait_until_gone(left_of(setup.folder), 10)


MODELS = ((0, "student"), (1, "teacher"))


def test_a_cluster_that_dies_ends_the_fleet(local_ray: LocalRay, setup: Setup) -> None:
    use(setup, local_ray)
    setup.settings["serving"]["student"]["engines"] = 1
    with setup.serve("sleep", "600") as serving:
        serving.wait_until_served()
        local_ray.close()
        assert serving.wait() == 1
    lost = f"error: the Ray cluster at {local_ray.address} does not answer any more"
    assert lost in serving.text()
    assert "its engines end with it" in serving.text()
    assert not wait_until_gone(left_of(setup.folder), 30)
    assert not endpoints_path(setup.directory).exists()


def test_a_fleet_without_the_token_is_not_let_in(
    local_ray: LocalRay, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    use(setup, local_ray)
    with setup.serve() as serving:
        assert serving.wait() == 2
    assert f"error: serving.ray_address is {local_ray.address}: Ray does not" in serving.text()
