"""What breaks a live run: it ends within 30 seconds, tells why, and continues.

Each drill does something to a run in the middle of a rollout. ``test_failures.py`` has the drills
that need no engines.
"""

from __future__ import annotations

import copy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.drills import (
    assert_continues,
    drill,
    saved_step,
    send,
    wait_for_rollout,
)
from tests.end_to_end.programs import torchrun, write_config

pytestmark = pytest.mark.long

SERVE = (sys.executable, "-m", "sod_mcore.serving")
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def fleet(live_run: LiveRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Engines for several runs, one after the other; the folder that tells their addresses."""
    folder = tmp_path_factory.mktemp("fleet")
    config = configuration(live_run, folder / "run", None)
    with drill([*SERVE, str(config)], folder / "run", folder) as it:
        it.wait_for_text("addresses written")
        yield folder / "run"
        send(it.process, signal.SIGTERM)
        it.process.wait(timeout=60)
        assert not it.members()


@pytest.fixture
def config(live_run: LiveRun, fleet: Path, tmp_path: Path) -> Path:
    """Trains with the shared engines."""
    return configuration(live_run, tmp_path / "run", fleet)


def configuration(live_run: LiveRun, run: Path, serving: Path | None) -> Path:
    """A run with long rollouts that saves after every step.

    Args:
        run: its folder.
        serving: where the engines' addresses are; None for the run's own folder.
    """
    tree: dict[str, Any] = copy.deepcopy(live_run.tree)
    tree["run"] |= {"directory": str(run), "export": None, "steps": 1000, "save_every": 1}
    tree["algorithm"] |= {"prompts_per_step": 64, "prompts_per_mini_batch": 16}
    tree["evaluation"]["data"] = None
    tree["serving"]["directory"] = None if serving is None else str(serving)
    # A killed process leaves W&B's temporary folders: these drills show that nothing of ours stays.
    tree["report"] = {"wandb": "disabled"}
    return write_config(run.with_name("live.yaml"), tree)


def train(config: Path, *overrides: str) -> list[str]:
    return torchrun(2, "pretrain_sod.py", str(config), *overrides)


def test_sigterm_in_a_rollout(config: Path, tmp_path: Path, record_property: Record) -> None:
    """The rollout is given up; the step before it is saved."""
    run = tmp_path / "run"
    with drill(train(config), run, tmp_path) as it:
        wait_for_rollout(it, 1)
        seconds = it.seconds_to_end(lambda: send(it.process, signal.SIGTERM))
        record_property("seconds_until_gone", round(seconds, 1))
        assert (it.outcome().outcome, it.outcome().reason) == ("stopped", "SIGTERM")
        assert it.outcome().completed_steps == saved_step(run) == 1
        assert "error:" not in it.output()
    assert_continues(train(config), run, tmp_path)


def test_a_killed_rollout_process(config: Path, tmp_path: Path, record_property: Record) -> None:
    run = tmp_path / "run"
    with drill(train(config), run, tmp_path) as it:
        wait_for_rollout(it, 1)
        worker = it.member("sod_mcore.rollout.worker")
        seconds = it.seconds_to_end(lambda: send(worker, signal.SIGKILL))
        record_property("seconds_until_gone", round(seconds, 1))
        cause = "the rollout pool ended with exit code -9"
        assert f"\nerror: {cause}" in it.output()
        assert f"error: {cause}" in it.output().rpartition("Root Cause")[2]
        assert it.outcome().outcome == "failed"
        assert it.outcome().reason.startswith(cause)
        assert saved_step(run) == 1
    assert_continues(train(config), run, tmp_path)


def test_a_row_that_only_a_verifier_finds_unusable(config: Path, tmp_path: Path) -> None:
    """Rows that can be read and played, and that nothing objects to before the run."""
    run = tmp_path / "run"
    verifier = "reward.verifiers={reasoning_gym: 'tests.end_to_end.unusable_rows:grade'}"
    small = ("algorithm.prompts_per_step=8", "algorithm.prompts_per_mini_batch=2")
    with drill(train(config, verifier, *small), run, tmp_path) as it:
        it.wait_until(lambda: it.process.poll() is not None)
        it.seconds_to_end(lambda: None)
        assert it.process.returncode == 1
        assert it.output().count("\nerror: ") == 1
        assert "UnusableRowError: train/" in it.output().rpartition("Root Cause")[2]
        assert it.outcome().outcome == "failed"
        assert "no answer fits this row" in it.outcome().reason
    assert_continues(train(config, *small), run, tmp_path)


def test_a_killed_engine(live_run: LiveRun, tmp_path: Path, record_property: Record) -> None:
    """Where it may not be started again, the service says which engine and shows its log, after all
    that the run has to say."""
    run = tmp_path / "run"
    config = configuration(live_run, run, None)
    command = [*SERVE, str(config), "serving.max_restarts=0", "--", *train(config)]
    with drill(command, run, tmp_path) as it:
        wait_for_rollout(it, 1)
        engine = student_engine(it.members(), live_run.tree["serving"]["student"]["model_path"])
        seconds = it.seconds_to_end(lambda: send(engine, signal.SIGKILL))
        record_property("seconds_until_gone", round(seconds, 1))
        assert it.process.returncode == 1
        cause = "student_engine_0 ended with exit code -9"
        before, _, after = it.output().rpartition(f"\nerror: {cause}")
        assert "rank 0" in before or "stopped after" in before
        log = (run / "serving" / "student_engine_0.log").read_text(errors="replace")
        assert after.rstrip().endswith(log.rstrip().splitlines()[-1])
        assert (it.outcome().outcome, it.outcome().reason) == ("failed", cause)
        assert it.outcome().completed_steps == saved_step(run) == 1
    assert_continues(command, run, tmp_path)


def student_engine(members: Sequence[psutil.Process], model_path: str) -> psutil.Process:
    """The first process of the engine; its children repeat its command line."""
    found = [p for p in members if {"sglang.launch_server", model_path} <= set(p.cmdline())]
    return min(found, key=lambda process: process.create_time())
