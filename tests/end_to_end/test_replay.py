"""Training on recorded batches: without engines, to the bit, across layouts, and continued."""

import copy
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.end_to_end.conftest import STEPS, LiveRun
from tests.end_to_end.programs import (
    REPOSITORY,
    environment,
    metrics,
    run,
    torchrun,
    training_numbers,
    write_config,
)


def replay(live_run: LiveRun, folder: Path, *overrides: str, processes: int = 2) -> Path:
    """Train on the live run's recordings in ``folder``; returns the run's directory."""
    tree: dict[str, Any] = copy.deepcopy(live_run.tree)
    tree["run"] |= {"directory": str(folder / "run"), "export": None}
    del tree["serving"]
    config = write_config(folder / "replay.yaml", tree)
    command = torchrun(processes, "pretrain_sod.py", str(config), *overrides)
    run([*command, "--replay", str(live_run.recordings)])
    return folder / "run"


def test_replay_repeats_the_live_run(live_run: LiveRun, tmp_path: Path) -> None:
    again = training_numbers(replay(live_run, tmp_path))
    live = training_numbers(live_run.directory)
    assert len(again) == STEPS
    assert again == live


def test_two_starts_equal_one_to_the_bit(live_run: LiveRun, tmp_path: Path) -> None:
    half = STEPS // 2
    # The schedule's horizon is run.steps, so the first starts are stopped by a stop file.
    stop_file = tmp_path / "run" / "stop"
    stop_file.parent.mkdir()
    for _ in range(half):
        stop_file.touch()
        replay(live_run, tmp_path)
        assert not stop_file.exists(), "the next start must go on"
    assert len(training_numbers(tmp_path / "run")) == half
    continued = training_numbers(replay(live_run, tmp_path))
    assert continued == training_numbers(live_run.directory)


def test_tensor_parallelism_changes_nothing_but_rounding(live_run: LiveRun, tmp_path: Path) -> None:
    single = replay(
        live_run, tmp_path, "student.megatron.tensor_model_parallel_size=1", processes=1
    )
    expected = training_numbers(live_run.directory)[0]
    got = training_numbers(single)[0]
    for name in ("update/loss", "update/grad_norm", "distillation/reverse_kl"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, err_msg=name)


def test_ctrl_c_saves_and_the_next_start_continues(live_run: LiveRun, tmp_path: Path) -> None:
    tree: dict[str, Any] = copy.deepcopy(live_run.tree)
    tree["run"] |= {"directory": str(tmp_path / "run"), "export": None, "steps": 1000}
    tree["run"]["replay"] = str(live_run.recordings / "step_000000.npz")
    del tree["serving"]
    config = write_config(tmp_path / "replay.yaml", tree)
    command = torchrun(2, "pretrain_sod.py", str(config))
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        _wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    stopped_at = metrics(tmp_path / "run")[-1]["step"]
    assert 2 <= stopped_at < 1000
    run([*command, f"run.steps={stopped_at + 1}"])
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == list(range(len(steps)))
    assert steps[-1] == stopped_at + 1


def _wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) <= count:
        assert time.monotonic() < deadline, f"{path} has too few lines"
        time.sleep(0.2)
