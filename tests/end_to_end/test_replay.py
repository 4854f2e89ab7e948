"""Training on recorded batches: without engines, to the bit, and stopped by Ctrl-C."""

import signal
import subprocess
import time
from pathlib import Path

from tests.end_to_end.conftest import STEPS, LiveRun
from tests.end_to_end.programs import REPOSITORY, environment, metrics, run, training_numbers
from tests.end_to_end.replays import assert_same_weights, replay, replay_command


def test_replay_repeats_the_live_run(live_run: LiveRun, tmp_path: Path) -> None:
    again = training_numbers(replay(live_run, tmp_path))
    live = training_numbers(live_run.directory)
    assert len(again) == STEPS
    assert again == live
    assert_same_weights(tmp_path / "export", live_run.exported)


def test_ctrl_c_saves_and_the_next_start_continues(live_run: LiveRun, tmp_path: Path) -> None:
    batch = live_run.recordings / "step_000000.npz"
    command = [*replay_command(live_run, tmp_path)[:-1], str(batch)]
    with subprocess.Popen(
        [*command, "run.steps=1000"],
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
