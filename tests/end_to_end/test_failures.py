"""What breaks a run, on recorded batches: it ends within 30 seconds, tells why, and continues.

Each drill does something to a run with two ranks and no engines. ``test_live_failures.py`` has
those that need engines.
"""

from __future__ import annotations

import copy
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.outcome import read_outcome
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.drills import (
    assert_continues,
    drill,
    saved_step,
    send,
    steps_of,
)
from tests.end_to_end.programs import torchrun, write_config
from tests.end_to_end.replays import newest_checkpoint
from tests.end_to_end.small_disk import small_disk

KILLED = "Signal 9 (SIGKILL)"


@pytest.fixture
def config(live_run: LiveRun, tmp_path: Path) -> Path:
    """Trains on one recorded batch over and over, and saves after every step."""
    tree: dict[str, Any] = copy.deepcopy(live_run.tree)
    tree["run"] |= {
        "directory": str(tmp_path / "run"),
        "export": None,
        "steps": 1000,
        "save_every": 1,
        "replay": str(live_run.recordings / "step_000000.npz"),
    }
    # A killed process leaves W&B's temporary folders: those drills show that nothing of ours stays.
    tree["report"] = {"wandb": "disabled"}
    del tree["serving"]
    return write_config(tmp_path / "replay.yaml", tree)


def train(config: Path, *overrides: str) -> list[str]:
    return torchrun(2, "pretrain_sod.py", str(config), *overrides)


def test_sigterm_saves_the_step_and_ends(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with drill(train(config, "run.save_every=0", "report.wandb=offline"), run, tmp_path) as it:
        it.wait_for_step(2)
        it.seconds_to_end(lambda: send(it.process, signal.SIGTERM))
        outcome = it.outcome()
        assert (outcome.outcome, outcome.reason) == ("stopped", "SIGTERM")
        assert outcome.completed_steps == saved_step(run) == steps_of(run)[-1] >= 2
        assert "the same command continues from there" in it.output()
        assert "error:" not in it.output()
    assert_continues(train(config), run, tmp_path)


def test_a_killed_rank(config: Path, tmp_path: Path) -> None:
    """The other rank lost its peer; torchrun's report names the one that was killed."""
    run = tmp_path / "run"
    with drill(train(config, "report.wandb=offline"), run, tmp_path) as it:
        it.wait_for_step(2)
        it.seconds_to_end(lambda: send(it.ranks()[1], signal.SIGKILL))
        assert it.process.returncode == 1
        root_cause = it.output().rpartition("Root Cause")[2]
        assert "rank      : 1" in root_cause
        assert KILLED in root_cause
        assert "rank 0 ends as well: another rank is gone" in it.output()
        assert it.outcome().outcome == "failed"
    assert_continues(train(config), run, tmp_path)


def test_a_killed_launcher_takes_its_ranks_with_it(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with drill(train(config), run, tmp_path) as it:
        it.wait_for_step(2)
        it.seconds_to_end(lambda: send(it.process, signal.SIGKILL))
        assert read_outcome(run) is None, "nobody was left to write it"
    assert_continues(train(config), run, tmp_path)


def test_a_rank_that_is_stuck(config: Path, tmp_path: Path) -> None:
    """The others notice after the timeout, and from then on it takes no longer than any failure."""
    run = tmp_path / "run"
    with drill(train(config, "run.collective_timeout_seconds=15"), run, tmp_path) as it:
        it.wait_for_step(2)
        send(it.ranks()[1], signal.SIGSTOP)
        it.seconds_to_end(lambda: it.wait_for_text("run.collective_timeout_seconds"))
        assert "another rank is stuck" in it.output().rpartition("Root Cause")[2]
        assert "another rank is stuck" in it.outcome().reason
    assert_continues(train(config), run, tmp_path)


def test_a_stop_that_comes_to_nothing_is_forced(config: Path, tmp_path: Path) -> None:
    """A rank that waits for a stopped one cannot end in order: it says where it was, and ends."""
    run = tmp_path / "run"
    with drill(train(config, "run.stop_grace_seconds=5"), run, tmp_path) as it:
        it.wait_for_step(2)
        stuck = it.ranks()[1]
        send(stuck, signal.SIGSTOP)
        it.wait_until(lambda: it.ranks()[0].status() == "sleeping")
        send(it.ranks()[0], signal.SIGTERM)
        it.seconds_to_end(lambda: it.wait_for_text("did not end within 5 s"))
        assert "Current thread" in it.output() or "Thread 0x" in it.output()
    assert_continues(train(config), run, tmp_path)


def test_two_agents_on_one_host(config: Path, tmp_path: Path) -> None:
    """torchrun on two nodes; the signal that a scheduler sends to both stops the run in order."""
    run = tmp_path / "run"
    port = free_port()
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(drill(agent(config, port), run, tmp_path / f"node_{i}"))
            for i in range(2)
        ]
        nodes[0].wait_for_step(2)
        assert [len(node.ranks()) for node in nodes] == [1, 1]
        send(nodes[0].process, signal.SIGTERM)
        nodes[1].seconds_to_end(lambda: send(nodes[1].process, signal.SIGTERM))
        nodes[0].seconds_to_end(lambda: None)
        assert nodes[0].outcome().outcome == "stopped"
        assert nodes[0].outcome().completed_steps == saved_step(run)
    assert_continues(train(config), run, tmp_path)


def test_a_killed_rank_of_another_node(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    port = free_port()
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(drill(agent(config, port), run, tmp_path / f"node_{i}"))
            for i in range(2)
        ]
        nodes[0].wait_for_step(2)
        nodes[0].seconds_to_end(lambda: send(nodes[1].ranks()[0], signal.SIGKILL))
        nodes[1].seconds_to_end(lambda: None)
        assert KILLED in nodes[1].output().rpartition("Root Cause")[2]
        assert "another rank is gone" in nodes[0].output()
    assert_continues(train(config), run, tmp_path)


def test_a_full_disk(config: Path, live_run: LiveRun, tmp_path: Path) -> None:
    """The second checkpoint does not fit; with more room, the run goes on from the first."""
    run = tmp_path / "run"
    kilobytes = kilobytes_of(newest_checkpoint(live_run.directory)) * 8 // 5
    with small_disk(run, kilobytes) as disk:
        command, seen = disk.inside(train(config)), disk.seen_from_outside
        with drill(command, seen, tmp_path) as it:
            it.wait_for_step(1)
            it.seconds_to_end(lambda: None)
            full = f"{run / 'checkpoints'}: No space left on device"
            assert f"\nerror: {full}" in it.output()
            assert "Traceback" not in it.output().partition("\nerror: ")[0]
            assert "rank 1 ends as well" in it.output()
            assert full in it.output().rpartition("Root Cause")[2]
            assert it.outcome().reason.startswith(full)
        left = {path.name for path in (seen / "checkpoints").iterdir()}
        assert left == {"step_00000001", "latest"}
        disk.resize(10 * kilobytes)
        assert_continues(command, seen, tmp_path)


def kilobytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) >> 10


def agent(config: Path, port: int) -> list[str]:
    """The command of one of two nodes."""
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}")
    nodes = ("--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1")
    launcher = (sys.executable, "-m", "torch.distributed.run", *rendezvous, *nodes)
    return [*launcher, "pretrain_sod.py", str(config)]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
