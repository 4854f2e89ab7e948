"""A disk without room for new weights, on a live engine: the run ends and tells why, the engine
keeps what it has, and the same command continues when there is room.

Checkpoints on a full disk: ``test_failures.py``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from sod_mcore.loop.weight_sync import probe_token_ids
from sod_mcore.serving.endpoints import read_endpoints
from sod_mcore.serving.weights.update import probe_logprobs
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.drills import Drill, assert_continues, drill, saved_step, send
from tests.end_to_end.small_disk import SmallDisk, small_disk
from tests.end_to_end.test_live_failures import configuration, train

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

SERVE = (sys.executable, "-m", "sod_mcore.serving")
DISK_KILOBYTES = 64 << 10
SMALL = (
    *("algorithm.prompts_per_step=8", "algorithm.prompts_per_mini_batch=2"),
    # The sandbox is started as a user that the namespace of the small disk does not have.
    "tools.names=[]",
)


@pytest.mark.parametrize("left_kilobytes", [256, 0])
def test_no_room_for_new_weights(
    live_run: LiveRun,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    left_kilobytes: int,
) -> None:
    """A version of the weights has 2.3 MB; other small files find room, or do not."""
    run, fleet = tmp_path / "run", tmp_path / "fleet"
    fleet.mkdir()
    with small_disk(run, DISK_KILOBYTES) as disk:
        seen = disk.seen_from_outside
        served = configuration(live_run, fleet / "run", None)
        with drill(disk.inside([*SERVE, str(served)]), fleet / "run", fleet) as engines:
            engines.wait_for_text("addresses written")
            command = disk.inside(train(configuration(live_run, run, fleet / "run"), *SMALL))
            with drill(command, seen, tmp_path) as it:
                wait_for_updates(it, 1)
                filler = fill(disk, left_kilobytes)
                record_property("seconds_until_gone", round(it.seconds_to_end(lambda: None), 1))
                assert_told(it, run / "weights" / "version_000002")
            assert saved_step(seen) == 1
            assert_whole(seen / "weights", {"version_000000", "version_000001"})
            assert_serves(fleet / "run", seen / "weights" / "version_000001")
            filler.unlink()
            assert_continues(command, seen, tmp_path)
            send(engines.process, signal.SIGTERM)
            engines.process.wait(timeout=60)


def wait_for_updates(it: Drill, step: int) -> None:
    """Until the updates behind ``step`` have begun; the new weights follow in a moment."""
    it.wait_for_step(step)
    it.wait_until(lambda: "updates" in it.output().rpartition(f"step {step}/")[2])


def fill(disk: SmallDisk, left_kilobytes: int) -> Path:
    """Write a file that leaves so much room; its path as seen from outside."""
    path = disk.seen_from_outside / "filler"
    with path.open("wb") as file:
        free = os.statvfs(disk.seen_from_outside)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_bsize - (left_kilobytes << 10))
    return path


def assert_told(it: Drill, folder: Path) -> None:
    """One error that names the folder, on the screen, in torchrun's report and in the record."""
    full = f"{folder}: No space left on device; make room, and the same command continues"
    assert it.process.returncode == 1
    assert it.output().count("\nerror: ") == 1
    assert f"\nerror: {full}" in it.output()
    assert "Traceback" not in it.output().partition("\nerror: ")[0]
    assert "rank 1 ends as well" in it.output()
    assert full in it.output().rpartition("Root Cause")[2]
    assert (it.outcome().outcome, it.outcome().completed_steps) == ("failed", 1)
    assert it.outcome().reason.startswith(full)


def assert_whole(folder: Path, names: set[str]) -> None:
    """These versions are there, nothing half written is, and each can be read to its end."""
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        weights = load_file(folder / name / "model.safetensors")
        assert all(np.isfinite(values).all() for values in weights.values())


def assert_serves(fleet: Path, folder: Path) -> None:
    """The engine answers, with the weights of ``folder``."""
    ids = probe_token_ids(vocab_size=200)
    (found,) = probe_logprobs(read_endpoints(fleet), "student", ids, 60.0)
    np.testing.assert_allclose(found[1:], logprobs(folder, ids)[1:], atol=1e-4)


def logprobs(folder: Path, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Of each token by plain transformers; entry 0 is NaN."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(token_ids.astype(np.int64))[None]
    with torch.no_grad():
        values = model(ids).logits[0].log_softmax(-1)
    picked = values[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
    return np.concatenate([[np.nan], picked]).astype(np.float32)
