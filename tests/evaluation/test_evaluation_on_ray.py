"""An evaluation whose engines and conversations are both on the nodes of a Ray cluster."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.end_to_end.programs import REPOSITORY, environment, write_config
from tests.evaluation.teacher_settings import PROBLEMS, command, samples, settings
from tests.serving.processes import wait_until_gone
from tests.serving.ray_nodes import left_of, nodes_on_loopback

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

PATIENCE = 600.0
ENGINE, ROLLOUTS = "ray::EngineActor", "ray::RolloutActor"


def test_engines_and_conversations_on_one_cluster(tmp_path: Path) -> None:
    tree = settings(tmp_path)
    tree["report"] = {"wandb": "disabled"}
    with nodes_on_loopback() as cluster:
        on_ray = {"ray_address": cluster.address}
        tree["serving"] |= {"engines_on": "ray", "device": "cpu", **on_ray}
        tree["rollout"] |= {"pool": "ray", "ray_actors": 2, "ray_actor_cpus": 1, **on_ray}
        tree["evaluation"] |= {"temperature": 0.0, "samples": 1}
        config, log = write_config(tmp_path / "evaluation.yaml", tree), tmp_path / "log"
        with log.open("wb") as output:
            program = subprocess.Popen(
                command(config),
                cwd=REPOSITORY,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            seen = actors_until_the_end(program)
        finally:
            program.kill()
            program.wait()
        assert program.returncode == 0, log.read_text()
        assert (seen[ENGINE], seen[ROLLOUTS]) == (1, 2)
        assert not wait_until_gone(left_of(tmp_path), 60)
    everything = samples(config)
    assert sorted(sample["prompt_id"] for sample in everything) == sorted(
        f"eval/{number}" for number in range(PROBLEMS)
    )
    assert sum(sample["is_correct"] for sample in everything) > 0.9 * PROBLEMS
    assert all("tool" in [m["role"] for m in sample["messages"]] for sample in everything)
    result = json.loads((tmp_path / "output" / "results.jsonl").read_text())
    assert result["dropped"] == 0


def actors_until_the_end(program: subprocess.Popen[bytes]) -> dict[str, int]:
    """How many actors of each kind there were at most at the same time."""
    most = {ENGINE: 0, ROLLOUTS: 0}
    deadline = time.monotonic() + PATIENCE
    while program.poll() is None:
        assert time.monotonic() < deadline, "the evaluation does not end"
        titles = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                titles.append(" ".join(process.cmdline()))
        for kind in most:
            most[kind] = max(most[kind], sum(title.startswith(kind) for title in titles))
        time.sleep(0.2)
    return most
