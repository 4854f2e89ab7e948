"""A Ray of one run: nothing of it can be reached from outside, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sod_mcore.rollout.on_ray.ray_cluster import LocalRay
from tests.end_to_end.programs import environment
from tests.rollout.input_engine import InputEngine, served, write_fleet
from tests.serving.processes import Process, descendants, running, wait_until_gone

pytestmark = pytest.mark.long

PATIENCE = 300.0
GONE_SECONDS = 60.0


@contextmanager
def playing(directory: Path, cluster: LocalRay | None = None) -> Iterator[subprocess.Popen[str]]:
    """A program that plays with all conversations held in the middle, on a Ray of its own or on
    ``cluster``."""
    rollout = {"pool": "ray", "ray_address": cluster and cluster.address}
    variables = cluster.environment if cluster else {}
    engine = InputEngine(holds=lambda text: True)
    command = [sys.executable, "-m", "tests.rollout.pool_program", str(directory)]
    with served(engine) as url:
        write_fleet(directory, url)
        program = subprocess.Popen(
            [*command, json.dumps(rollout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment(), **variables},
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while not engine.held:
                assert program.poll() is None, program.stdout and program.stdout.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield program
        finally:
            program.kill()
            program.wait()


def one_of(family: set[Process], words: str) -> Process:
    """The process with these words in its command line."""
    (found,) = [process for process in family if words in command_line(process[0])]
    return found


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def folder_of(guardian: Process) -> Path:
    """Where its Ray keeps its files."""
    words = command_line(guardian[0]).split()
    return Path(words[words.index("sod_mcore.rollout.on_ray.local_ray") + 2])


@pytest.mark.parametrize("killed", ["the run", "local_ray", "raylet/raylet", "gcs/gcs_server"])
def test_nothing_is_left_whatever_is_killed(killed: str, tmp_path: Path) -> None:
    home_before = (Path.home() / ".ray").exists()
    with playing(tmp_path) as program:
        family = descendants(program.pid)
        guardian = one_of(family, "sod_mcore.rollout.on_ray.local_ray")
        folder = folder_of(guardian)
        assert folder.is_dir()
        assert listening_addresses(family) == {"127.0.0.1"}
        if killed == "the run":
            program.kill()
        else:
            os.kill(one_of(family, killed)[0], signal.SIGKILL)
        output, _ = program.communicate(timeout=PATIENCE)
        if killed != "the run":
            assert program.returncode == 1
            assert "LostRayError: the Ray of this run ended with exit code" in output
        assert not wait_until_gone(family, GONE_SECONDS)
        assert not folder.exists()
    assert (Path.home() / ".ray").exists() == home_before, "no secret on the disk"


def test_a_cluster_that_dies_ends_the_run_in_order(tmp_path: Path) -> None:
    """Ray alone would end the process after a minute, and say nothing of the run."""
    cluster = LocalRay(tmp_path / "cluster.log")
    try:
        with playing(tmp_path, cluster) as program:
            cluster.close()
            output, _ = program.communicate(timeout=PATIENCE)
            assert program.returncode == 1
            lost = f"LostRayError: the Ray cluster at {cluster.address} does not answer any more"
            assert lost in output
    finally:
        cluster.close()


def test_a_joined_cluster_goes_on(tmp_path: Path) -> None:
    cluster = LocalRay(tmp_path / "cluster.log")
    try:
        for _ in range(2):
            with playing(tmp_path, cluster) as program:
                program.send_signal(signal.SIGTERM)
                assert program.wait(PATIENCE) == -signal.SIGTERM
            cluster.check()
    finally:
        cluster.close()


def listening_addresses(processes: set[Process]) -> set[str]:
    """Addresses on which Ray's own processes accept connections."""
    sockets = set()
    for pid, _ in running(processes):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(entry))
            except FileNotFoundError:
                continue
    inodes = {name[8:-1] for name in sockets if name.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                # The last four bytes, also of an IPv4 address in IPv6, in the machine's order.
                last = bytes.fromhex(fields[1].split(":")[0][-8:])
                found.add(".".join(str(byte) for byte in reversed(last)))
    return found


@pytest.mark.parametrize("program", ["training", "evaluation"])
def test_signals_reach_those_who_wait_for_them(program: str, tmp_path: Path) -> None:
    with served(InputEngine()) as url:
        write_fleet(tmp_path, url)
        done = subprocess.run(
            [sys.executable, "-m", "tests.rollout.stop_program", str(tmp_path), program],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=environment(),
            check=False,
        )
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["heard SIGTERM", "closed"]), (
        done.stderr
    )
