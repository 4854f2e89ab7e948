"""What every failure drill needs: a run that can be told from all others, and what must hold after.

Each process of the run carries a variable of its own in its environment, so that none is missed,
whatever its parent, its group or its session has become.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from sod_mcore.outcome import Outcome, read_outcome
from tests.end_to_end.programs import REPOSITORY, environment, metrics

MARKER = "SOD_MCORE_DRILL"
END_SECONDS = 30.0
"""Longest time from an event to the end of the last process."""
START_SECONDS = 240.0


@dataclasses.dataclass
class Drill:
    """A running command, its output so far, and everything that it started."""

    process: subprocess.Popen[bytes]
    marker: str
    log: Path
    temporary: Path
    run_directory: Path

    def output(self) -> str:
        """All that was printed."""
        return self.log.read_text(errors="replace")

    def last_lines(self, count: int) -> str:
        """The last lines printed that are not empty."""
        lines = [line for line in self.output().splitlines() if line.strip()]
        return "\n".join(lines[-count:])

    def members(self) -> list[psutil.Process]:
        """Every living process of the run."""
        return [p for p in psutil.process_iter() if _has_marker(p, self.marker)]

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, in the order of their ranks."""
        found = {p.environ()["RANK"]: p for p in self.members() if "pretrain_sod.py" in _own(p)}
        return [found[rank] for rank in sorted(found)]

    def member(self, part_of_command: str) -> psutil.Process:
        """The one process whose command line has this part; a child of it may have it for the
        moment between its fork and its exec."""
        found = [p for p in self.members() if any(part_of_command in a for a in _command(p))]
        (parent,) = [p for p in found if p.ppid() not in {other.pid for other in found}]
        return parent

    def wait_until(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Wait for ``condition``; the command must not end before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output()[-6000:]
            assert time.monotonic() < deadline, self.output()[-6000:]
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics of ``step`` are written."""
        self.wait_until(lambda: bool(steps_of(self.run_directory)[step:]))

    def wait_for_text(self, text: str) -> None:
        """Wait until the run has printed ``text``."""
        self.wait_until(lambda: text in self.output())

    def seconds_to_end(self, event: Callable[[], object]) -> float:
        """Seconds from ``event`` to the end of the last process; asserts that nothing is left."""
        ports = self._listening_ports()
        started = time.monotonic()
        event()
        # A process that is about to be gone has no environment any more, but ports for a moment.
        while self.members() or ports & _all_listening_ports():
            seconds = time.monotonic() - started
            left = [_command(p) for p in self.members()]
            assert seconds < END_SECONDS, f"left: {left}, {ports}\n{self.output()}"
            self.process.poll()
            time.sleep(0.1)
        seconds = time.monotonic() - started
        code = self.process.wait(timeout=5)
        print(f"ended after {seconds:.1f} s with exit code {code}:\n{self.last_lines(4)}")
        self._assert_nothing_temporary()
        return seconds

    def outcome(self) -> Outcome:
        """How the run says that it ended."""
        outcome = read_outcome(self.run_directory)
        assert outcome is not None, self.output()
        return outcome

    def _listening_ports(self) -> set[int]:
        pids = {p.pid for p in self.members()}
        return {
            c.laddr.port
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.pid in pids
        }

    def _assert_nothing_temporary(self) -> None:
        # torchrun leaves a folder with its ranks' error files at every end, good ones included; the
        # package wandb, once imported, two in a process that is killed; SGLang, empty files and
        # sockets.
        foreign = re.compile(r"torchelastic_\w+|tmp\w+wandb-(media|artifacts)|tmp\w{8}")
        left = [p for p in self.temporary.iterdir() if not foreign.fullmatch(p.name)]
        assert not left, left


@contextmanager
def drill(command: Sequence[str], run_directory: Path, folder: Path) -> Iterator[Drill]:
    """Start ``command``; whatever happens in the test, its processes end with it.

    Args:
        run_directory: ``run.directory`` of the command.
        folder: receives the output, and serves as the folder for temporary files.
    """
    marker = uuid.uuid4().hex
    temporary = folder / f"tmp_{marker[:8]}"  # a short name: sockets are made below it
    temporary.mkdir(parents=True)
    log = folder / f"output_{marker[:8]}.log"
    variables = {**environment(), MARKER: marker, "TMPDIR": str(temporary)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started = Drill(process, marker, log, temporary, run_directory)
    try:
        yield started
    finally:
        for member in started.members():
            member.kill()
        process.wait(timeout=30)


def steps_of(run_directory: Path) -> list[int]:
    """The steps whose metrics are written so far."""
    if not (run_directory / "metrics.jsonl").exists():
        return []
    return [line["step"] for line in metrics(run_directory)]


def wait_for_rollout(it: Drill, step: int) -> None:
    """Until the first trajectories of ``step`` (counted from 0) are there, and most are not."""
    it.wait_for_step(step)
    it.wait_until(lambda: "rollout and scoring" in it.output().rpartition(f"step {step}/")[2])


def saved_step(run_directory: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    latest = run_directory / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0


def assert_continues(command: Sequence[str], run_directory: Path, folder: Path) -> None:
    """The same command goes on from the newest checkpoint, and nothing was lost or repeated."""
    first = saved_step(run_directory)
    with drill([*command, f"run.steps={first + 1}"], run_directory, folder) as again:
        code = again.process.wait(timeout=START_SECONDS)
        assert code == 0, again.output()[-6000:]
        assert again.outcome() == Outcome("finished", first + 1, "all steps are done")
        assert f"step {first + 1}/{first + 1}" in again.output()
        if first:
            assert f"step {first}/" not in again.output(), "trained again although it was saved"
    written = steps_of(run_directory)
    assert written == list(range(written[0], first + 2))
    left = [path for path in run_directory.rglob(".*") if path.name.endswith((".tmp", ".old"))]
    assert not left, left


def send(process: psutil.Process | subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal."""
    os.kill(process.pid, number)


def _has_marker(process: psutil.Process, marker: str) -> bool:
    try:
        return process.environ().get(MARKER) == marker
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        arguments: list[str] = process.cmdline()
    except psutil.NoSuchProcess:
        return []
    return arguments


def _own(process: psutil.Process) -> str:
    """The program that a Python process runs, without torchrun's own arguments."""
    command = _command(process)
    is_launcher = "torch.distributed.run" in command or "sod_mcore.serving" in command
    return "" if is_launcher else " ".join(command[1:3])


def _all_listening_ports() -> set[int]:
    return {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
