"""A run whose engines are on the nodes of a Ray cluster, one of which dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from examples.arithmetic.command_line import RECIPE
from examples.arithmetic.make_data import write_data
from examples.arithmetic.settings import ArithmeticSettings
from sod_mcore.config_file import load_config
from sod_mcore.outcome import EXIT_STOPPED
from sod_mcore.serving.endpoints import read_endpoints
from sod_mcore.serving.weights.update import weight_versions
from sod_mcore.trajectory import RecordedBatch, recorded_batch_path
from tests.end_to_end.conftest import SMALL_DATA, configuration, noisy_student
from tests.end_to_end.programs import REPOSITORY, environment, metrics, torchrun, write_config
from tests.serving.processes import wait_until_gone
from tests.serving.ray_nodes import WORKERS, kill_node, left_of, nodes_on_loopback

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

PATIENCE = 600.0
STEPS_AFTER = 3
"""Steps that the run goes on for when the engine is back."""


def test_a_node_that_dies_takes_no_step_with_it(tmp_path: Path) -> None:
    """Its engine comes back on another node, under another address, and gets the weights."""
    student = noisy_student(tmp_path / "student")
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data", load_config(ArithmeticSettings, RECIPE, SMALL_DATA).data)
    tree = configuration(tmp_path, student)
    tree["run"]["steps"] = 10000
    with nodes_on_loopback() as cluster:
        tree["serving"] |= {"engines_on": "ray", "ray_address": cluster.address, "device": "cpu"}
        tree["serving"]["weight_sync"] = "distributed"
        tree["serving"]["student"]["engines"] = 2
        config = write_config(tmp_path / "sod.yaml", tree)
        recordings, log = tmp_path / "recordings", tmp_path / "log"
        train = torchrun(2, "pretrain_sod.py", str(config), "--record", str(recordings))
        with log.open("wb") as output:
            program = subprocess.Popen(
                [sys.executable, "-m", "sod_mcore.serving", str(config), "--", *train],
                cwd=REPOSITORY,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

        def until(condition: Callable[[], bool]) -> None:
            deadline = time.monotonic() + PATIENCE
            while not condition():
                assert program.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)

        run = tmp_path / "run"
        try:
            until(lambda: len(lines(run)) > 2)
            before = read_endpoints(run).model("student").engines
            victim = next(host for host in hosts(run) if host in WORKERS)
            kill_node(cluster, victim)
            until(lambda: victim not in hosts(run))
            steps = len(lines(run))
            until(lambda: len(lines(run)) > steps + STEPS_AFTER)
            endpoints = read_endpoints(run)
            after = endpoints.model("student").engines
            assert len(set(before) & set(after)) == 1
            assert min(weight_versions(endpoints, "student", 60.0)) > steps
            program.send_signal(signal.SIGTERM)
            assert program.wait(PATIENCE) == EXIT_STOPPED, log.read_text()
        finally:
            program.kill()
            program.wait()
        assert not wait_until_gone(left_of(tmp_path), 60)
    for line in lines(run):
        assert line["weights/probe_difference"] < 1e-4
        assert line.get("rollout/dropped", 0) == line.get("rollout/unscored", 0) == 0
    for step in range(steps):
        for trajectory in RecordedBatch.load(recorded_batch_path(recordings, step)).trajectories:
            assert (trajectory.weight_version[trajectory.loss_mask] == step).all()


def hosts(run: Path) -> list[str]:
    """The nodes of the student's engines now."""
    return [urlsplit(url).hostname or "" for url in read_endpoints(run).model("student").engines]


def lines(run: Path) -> list[dict[str, float]]:
    """The run's metrics so far."""
    return metrics(run) if (run / "metrics.jsonl").exists() else []
