"""What a job file does in one attempt: real bash and real signals, SLURM's commands played."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from sod_mcore.outcome import Outcome, read_outcome, read_outcome_before, write_outcome
from sod_mcore.slurm.command_line import main
from tests.slurm.small_config import write_small_config

FAKES = Path(__file__).with_name("fake_slurm")
SECONDS = 60.0
NO_GPUS: dict[str, dict[str, list[int]]] = {"student": {"gpus": []}, "teacher": {"gpus": []}}


@dataclass
class Attempt:
    """A job file that bash runs in ``folder``."""

    folder: Path
    process: subprocess.Popen[str]

    def warn(self) -> None:
        self.process.send_signal(signal.SIGUSR1)

    def wait_for(self, name: str) -> None:
        """Until the played run has made a file of that name."""
        deadline = time.monotonic() + SECONDS
        while not (self.folder / "run" / name).exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        output, _ = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, output

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    @property
    def requeues(self) -> list[str]:
        return [call for call in self.calls if call.startswith("scontrol")]


@contextmanager
def attempt(
    folder: Path,
    scenario: str,
    *,
    template: tuple[str, ...] = ("one_node",),
    python: Path = FAKES / "python",
    max_restarts: int = 2,
    **environment: str,
) -> Iterator[Attempt]:
    """Run a filled template as SLURM's first node would."""
    write_small_config(folder, run={"directory": str(folder / "run")}, serving=NO_GPUS)
    options = ["--template", *template, "--gpus-per-node=0", "--ranks-per-node=1", "--time=60"]
    options += ["--partition=p", f"--max-restarts={max_restarts}", "--output=job.sbatch"]
    assert main(["config.yaml", *options]) == 0
    job = (folder / "job.sbatch").read_text()
    (folder / "job.sbatch").write_text(
        job.replace(f"PYTHON={sys.executable}\n", f"PYTHON={python}\n")
    )
    (folder / "run").mkdir(exist_ok=True)
    (folder / "calls").touch()
    process = subprocess.Popen(
        ["bash", "job.sbatch"],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "PATH": f"{FAKES}:{os.environ['PATH']}",
            "SCENARIO": scenario,
            "SLURM_JOB_ID": "70007",
            "SLURM_JOB_NODELIST": "n[0-2]",
            "SLURM_JOB_NUM_NODES": "3" if len(template) > 1 else "1",
            "RUN": str(folder / "run"),
            "CALLS": str(folder / "calls"),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Attempt(folder, process)
    finally:
        process.kill()
        process.wait(timeout=SECONDS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_finished_run_ends_the_job(folder: Path) -> None:
    with attempt(folder, "finished") as job:
        code, output = job.end()
    assert code == 0, output
    assert not job.requeues
    step = job.calls[-1].split()
    attempt_folder = folder / "run" / "slurm" / "70007.0"
    assert attempt_folder.is_dir()
    assert f"--output={attempt_folder}/run.log" in step
    assert f"run.stop_file={folder}/run/stop" in step


def test_a_warning_saves_and_requeues(folder: Path) -> None:
    with attempt(folder, "until_stopped") as job:
        job.wait_for("running")
        job.warn()
        code, output = job.end()
    assert job.requeues == ["scontrol requeue 70007"]
    assert code == -signal.SIGTERM, "SLURM ends the shell, which must wait for that"
    assert "requeueing the job" in output


def test_torchrun_ends_with_0_when_the_run_was_stopped(folder: Path) -> None:
    with attempt(folder, "until_stopped", STOP_CODE="0") as job:
        job.wait_for("running")
        job.warn()
        job.end()
    assert len(job.requeues) == 1


def test_signals_do_not_cut_the_saving_short(folder: Path) -> None:
    with attempt(folder, "until_stopped", SAVING_SECONDS="1.5") as job:
        job.wait_for("running")
        job.warn()
        job.wait_for("stopping")
        for _ in range(3):
            job.warn()
            time.sleep(0.2)
            assert job.process.poll() is None
        assert not job.requeues
        job.end()
    assert len(job.requeues) == 1


def test_a_crash_is_not_started_again(folder: Path) -> None:
    with attempt(folder, "crash") as job:
        code, output = job.end()
    assert code == 3
    assert "not started again" in output
    assert not job.requeues


def test_what_an_earlier_attempt_left_does_not_count(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "stop").touch()
    write_outcome(folder / "run", Outcome("stopped", 3, "an earlier warning"))
    with attempt(folder, "silent", SLURM_RESTART_COUNT="1") as job:
        code, _ = job.end()
    assert code == 1, "a run that does not say how it ended has failed"
    assert not job.requeues
    assert "srun found a stop file" not in job.calls
    assert (folder / "run" / "slurm" / "70007.1").is_dir()
    assert read_outcome_before(folder / "run") == Outcome("stopped", 3, "an earlier warning")


def test_that_the_run_had_finished_stays_known_over_attempts_that_fail(folder: Path) -> None:
    finished = Outcome("finished", 8, "all steps are done")
    write_outcome(folder / "run", finished)
    for _ in range(2):
        with attempt(folder, "silent") as job:
            job.end()
        assert read_outcome(folder / "run") is None
        assert read_outcome_before(folder / "run") == finished
        write_outcome(folder / "run", Outcome("failed", 0, "a wrong setting"))


@pytest.mark.parametrize(("restarts", "requeues"), [("1", 1), ("2", 0), ("3", 0)])
def test_restarts_are_bounded(folder: Path, restarts: str, requeues: int) -> None:
    with attempt(folder, "until_stopped", SLURM_RESTART_COUNT=restarts) as job:
        job.wait_for("running")
        job.warn()
        code, output = job.end()
    assert len(job.requeues) == requeues
    if not requeues:
        assert code == 75
        assert f"restarted {restarts} times (MAX_RESTARTS)" in output


def test_a_refused_requeue_is_told(folder: Path) -> None:
    with attempt(folder, "until_stopped", REQUEUE="refused") as job:
        job.wait_for("running")
        job.warn()
        code, output = job.end()
    assert code == 75
    assert "SLURM refuses to requeue" in output


def test_a_run_that_a_person_stopped_stays_stopped(folder: Path) -> None:
    with attempt(folder, "stopped_by_user") as job:
        code, _ = job.end()
    assert code == 75
    assert not job.requeues


def test_a_run_that_finishes_after_the_warning(folder: Path) -> None:
    with attempt(folder, "finished_meanwhile") as job:
        job.wait_for("running")
        job.warn()
        code, _ = job.end()
    assert code == 0
    assert not job.requeues


def test_the_real_outcome_command_decides(folder: Path) -> None:
    write = folder / "python"
    write.write_text(
        f'#!/bin/sh\n[ "$3" = outcome ] && exec {sys.executable} "$@"\nexec {FAKES}/python "$@"\n'
    )
    write.chmod(0o755)
    with attempt(folder, "until_stopped", python=write, max_restarts=0) as job:
        job.wait_for("running")
        job.warn()
        code, output = job.end()
    assert "stopped after 3 steps: a test" in output
    assert code == 75


APART = ("engine_nodes", "--nodes=3", "--engine-nodes=1")


def test_engines_end_after_the_run(folder: Path) -> None:
    with attempt(folder, "finished", template=APART) as job:
        code, output = job.end()
    assert code == 0, output
    assert job.calls[-1] == "engines got USR2"
    steps = {_option(call, "job-name"): call for call in job.calls if call.startswith("srun")}
    assert _option(steps["engines"], "relative") == "2"
    assert _option(steps["trainer"], "nodes") == "2"
    assert "--rdzv-endpoint n0:20007" in steps["trainer"]
    assert "--rdzv-id 70007.0" in steps["trainer"]
    routing = next(call for call in job.calls if call.startswith("python"))
    assert 'serving.student.addresses=["http://n2:1"] serving.host=n0 -- srun' in routing


def test_engines_that_die_end_the_run(folder: Path) -> None:
    with attempt(folder, "engines_die", template=APART) as job:
        code, output = job.end()
    assert code == 128 + signal.SIGTERM
    assert "the engines have ended before the run" in output
    assert not job.requeues


def test_a_warning_reaches_a_run_over_several_nodes(folder: Path) -> None:
    with attempt(folder, "until_stopped", template=APART) as job:
        job.wait_for("running")
        job.warn()
        job.end()
    assert len(job.requeues) == 1
    assert "engines got USR2" in job.calls


def _option(call: str, name: str) -> str:
    return next(word.split("=")[1] for word in call.split() if word.startswith(f"--{name}="))
