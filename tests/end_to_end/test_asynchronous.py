"""Sampling a step ahead: real engines change their weights while conversations are under way, and
every token is what the weights that it names would have sampled."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sod_mcore.trajectory import RecordedBatch, Trajectory, recorded_batch_path
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.programs import metrics, run, torchrun, training_numbers, write_config

STEPS = 2
AHEAD = {"max_staleness": 1, "concurrency": 2}
"""Few conversations at a time, so that the second batch is under way when the weights change."""


@dataclass(frozen=True)
class AheadRun:
    """A run, its configuration and its recorded batches."""

    folder: Path
    config: Path
    tree: dict[str, Any]

    def batch(self, step: int) -> RecordedBatch:
        return RecordedBatch.load(recorded_batch_path(self.folder / "recordings", step))

    def weights(self, version: int) -> Path:
        """Hugging Face folder of a version; the first is the student itself."""
        if version == 0:
            return Path(self.tree["student"]["model_path"])
        return self.folder / "run" / "weights" / f"version_{version:06d}"


@pytest.fixture(scope="module")
def ahead(live_run: LiveRun, tmp_path_factory: pytest.TempPathFactory) -> AheadRun:
    folder = tmp_path_factory.mktemp("ahead")
    tree = copy.deepcopy(live_run.tree)
    tree["run"] = {"directory": str(folder / "run"), "steps": STEPS, "save_every": 0}
    tree["rollout"] |= AHEAD
    tree["algorithm"] |= {"prompts_per_step": 4, "topk": {"k": 0}, "tis_cap": 2.0}
    tree["evaluation"] = {}
    config = write_config(folder / "sod.yaml", tree)
    record = ["--record", str(folder / "recordings")]
    train = torchrun(2, "pretrain_sod.py", str(config), *record)
    run([sys.executable, "-m", "sod_mcore.serving", str(config), "--", *train], 300)
    return AheadRun(folder, config, tree)


def sampled_logprobs(folder: Path, trajectory: Trajectory) -> np.ndarray:
    """Log-probs ``[T]`` of all tokens by plain transformers; entry 0 is NaN."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    picked = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
    return np.concatenate([[np.nan], picked])


def test_a_batch_is_at_most_one_version_old(ahead: AheadRun) -> None:
    first, second = ahead.batch(0), ahead.batch(1)
    assert set(first.staleness) == {0}
    assert set(second.staleness) == {0, 1}, "begun with the old weights, ended with the new ones"
    line = metrics(ahead.folder / "run")[2]
    assert line["rollout/staleness_max"] == 1
    assert 0 < line["rollout/staleness"] < 1


def test_every_token_is_of_the_weights_that_it_names(ahead: AheadRun) -> None:
    batch = ahead.batch(1)
    versions = {int(v) for t in batch.trajectories for v in t.weight_version[t.loss_mask]}
    assert versions == {0, 1}
    for version in versions:
        folder = ahead.weights(version)
        theirs = [
            (t, (t.weight_version == version) & t.loss_mask)
            for t in batch.trajectories
            if (t.weight_version == version).any()
        ]
        for trajectory, own in theirs[:6]:
            expected = sampled_logprobs(folder, trajectory)[own]
            np.testing.assert_allclose(trajectory.rollout_logprobs[own], expected, atol=1e-4)


def test_the_recorded_run_is_replayed_to_the_bit(ahead: AheadRun, tmp_path: Path) -> None:
    """With or without sampling ahead: what is trained depends on the trajectories alone."""
    for staleness in (1, 0):
        directory = tmp_path / f"staleness_{staleness}"
        changes = (
            f"run.directory={directory}",
            f"run.replay={ahead.folder / 'recordings'}",
            f"rollout.max_staleness={staleness}",
        )
        run(torchrun(2, "pretrain_sod.py", str(ahead.config), *changes))
        assert training_numbers(directory) == training_numbers(ahead.folder / "run")
