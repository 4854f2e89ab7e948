"""Training on the recordings of the live run: without engines, and whole runs compared."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from sod_mcore.trajectory import recorded_batch_path
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.programs import REPOSITORY, environment, run, torchrun, write_config


def replay_command(
    live_run: LiveRun, folder: Path, *overrides: str, processes: int = 2
) -> list[str]:
    """The command that trains on the recordings; its run and export lie in ``folder``."""
    tree: dict[str, Any] = copy.deepcopy(live_run.tree)
    tree["run"] |= {"directory": str(folder / "run"), "export": str(folder / "export")}
    del tree["serving"]
    folder.mkdir(exist_ok=True)
    config = write_config(folder / "replay.yaml", tree)
    command = torchrun(processes, "pretrain_sod.py", str(config), *overrides)
    return [*command, "--replay", str(live_run.recordings)]


def replay(live_run: LiveRun, folder: Path, *overrides: str, processes: int = 2) -> Path:
    """Train on the recordings; returns the run's directory."""
    run(replay_command(live_run, folder, *overrides, processes=processes))
    return folder / "run"


def replay_until_recordings_end(live_run: LiveRun, folder: Path, *overrides: str) -> Path:
    """The same with the first recorded batch alone: the run fails after it has saved that step."""
    recordings = folder / "recordings"
    recordings.mkdir(parents=True)
    shutil.copy(recorded_batch_path(live_run.recordings, 0), recordings)
    command = replay_command(live_run, folder, *overrides, "run.save_every=1")
    command[-1] = str(recordings)
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "step_000001.npz is missing" in done.stdout, done.stdout[-6000:]
    return folder / "run"


def newest_checkpoint(run_directory: Path) -> Path:
    """The checkpoint that the next start would load."""
    checkpoints = run_directory / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text().strip()


def random_states(checkpoint: Path) -> list[Any]:
    """Those of every rank, in rank order."""
    paths = sorted(checkpoint.glob("random_*.pt"))
    return [torch.load(path, weights_only=False) for path in paths]


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Two exported folders hold the same numbers, to the bit."""
    first, second = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def is_same(ours: Any, theirs: Any) -> bool:
    """Equality of nested dictionaries, sequences, arrays and tensors."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, np.ndarray):
        return np.array_equal(ours, theirs)
    if isinstance(ours, dict):
        return set(ours) == set(theirs) and all(is_same(v, theirs[k]) for k, v in ours.items())
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(is_same, ours, theirs))
    return bool(ours == theirs)
