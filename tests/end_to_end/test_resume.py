"""A run in two starts equals a run in one: to the bit, after a kill, and on another layout.

Dropout is on where runs must be equal to the bit, so that a random state that was not restored
would show in every number.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.conftest import STEPS, LiveRun
from tests.end_to_end.drills import drill
from tests.end_to_end.programs import training_numbers
from tests.end_to_end.replays import (
    assert_same_weights,
    is_same,
    newest_checkpoint,
    random_states,
    replay,
    replay_command,
    replay_until_recordings_end,
)

DROPOUT = "student.megatron.hidden_dropout=0.1"
DISTRIBUTED = (
    "student.megatron.tensor_model_parallel_size=1",
    "optimizer.distributed=true",
    "ddp.overlap_grad_reduce=true",
    "ddp.overlap_param_gather=true",
)
TWO_BY_TWO = "student.megatron.pipeline_model_parallel_size=2"


def test_one_step_and_one_more_equal_two(live_run: LiveRun, tmp_path: Path) -> None:
    """DP2 with the distributed optimizer; four updates a step, each at another learning rate."""
    schedule = ("run.steps=2", "optimizer.schedule=cosine", "optimizer.warmup_updates=3")
    settings = (*DISTRIBUTED, *schedule, DROPOUT)
    straight = replay(live_run, tmp_path / "straight", *settings)
    replay_until_recordings_end(live_run, tmp_path / "twice", *settings)
    assert len(training_numbers(tmp_path / "twice" / "run")) == 1
    twice = replay(live_run, tmp_path / "twice", *settings)
    assert_same_run(twice, straight)
    rates = [line["update/lr"] for line in training_numbers(twice)]
    assert rates[0] > rates[1] > 0


def test_a_run_killed_while_it_saves_continues_from_the_checkpoint_before(
    live_run: LiveRun, tmp_path: Path
) -> None:
    """TP2: the whole run, with and without SIGKILL to all ranks in the middle of a save."""
    straight = replay(live_run, tmp_path / "straight", DROPOUT)
    settings = (DROPOUT, "run.save_every=1")
    folder = tmp_path / "killed"
    command = replay_command(live_run, folder, *settings)
    left = kill_while_saving(command, folder / "run", tmp_path)
    survivor = newest_checkpoint(folder / "run").name
    assert (survivor, left.name) in {(f"step_{n:08d}", f".step_{n + 1:08d}.tmp") for n in (1, 2, 3)}
    continued = replay(live_run, folder, *settings)
    assert not left.exists()
    assert_same_run(continued, straight)


@pytest.mark.parametrize(
    ("settings", "other_layout", "processes"),
    [
        ((), "student.megatron.tensor_model_parallel_size=1", 1),
        (DISTRIBUTED[1:], "student.megatron.tensor_model_parallel_size=1", 2),
    ],
    ids=["plain_to_tp1", "distributed_to_dp2"],
)
def test_a_checkpoint_of_two_by_two_continues_on_another_layout(
    live_run: LiveRun,
    tmp_path: Path,
    settings: tuple[str, ...],
    other_layout: str,
    processes: int,
) -> None:
    replay(live_run, tmp_path, *settings, TWO_BY_TWO, "run.steps=1", processes=4)
    numbers = training_numbers(
        replay(live_run, tmp_path, *settings, other_layout, processes=processes)
    )
    uninterrupted = training_numbers(live_run.directory)
    assert len(numbers) == STEPS
    for ours, theirs in zip(numbers, uninterrupted, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["update/lr"] == theirs["update/lr"]
        assert ours["update/tokens"] == theirs["update/tokens"]
        for name in ("update/loss", "update/grad_norm", "distillation/reverse_kl"):
            # At most 4e-6 was measured.
            np.testing.assert_allclose(ours[name], theirs[name], rtol=5e-5, err_msg=name)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Numbers, weights, random states and counters are equal to the bit; each has one W&B run."""
    assert training_numbers(ours) == training_numbers(theirs)
    assert_same_weights(ours.parent / "export", theirs.parent / "export")
    last, expected = newest_checkpoint(ours), newest_checkpoint(theirs)
    assert last.name == expected.name
    assert (last / "progress.json").read_text() == (expected / "progress.json").read_text()
    states = random_states(last)
    assert len(states) == 2
    assert is_same(states, random_states(expected))
    assert not list((ours / "checkpoints").glob(".*"))
    folders = list((ours / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    run_id = (ours / "wandb_run_id").read_text().strip()
    assert {folder.name.rsplit("-", 1)[1] for folder in folders} == {run_id}


def kill_while_saving(command: list[str], run_directory: Path, folder: Path) -> Path:
    """Kill all processes of ``command`` in the middle of its second save, or of a later one.

    Returns:
        the temporary folder that is left of the checkpoint.
    """
    checkpoints = run_directory / "checkpoints"

    def is_saving() -> bool:
        return (checkpoints / "latest").is_file() and any(checkpoints.glob(".step_*.tmp"))

    deadline = time.monotonic() + 240
    with drill(command, run_directory, folder) as running:
        while True:
            assert running.process.poll() is None, running.output()[-4000:]
            assert time.monotonic() < deadline, running.output()[-4000:]
            if not is_saving():
                time.sleep(0.005)
                continue
            # Ranks that stand still cannot complete the save between the check and the kill.
            ranks = running.ranks()
            for rank in ranks:
                rank.suspend()
            if is_saving():
                break
            for rank in ranks:
                rank.resume()
        for member in running.members():
            member.kill()
    (left,) = checkpoints.glob(".step_*.tmp")
    return left
