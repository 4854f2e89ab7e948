"""Jobs of the drills: a small arithmetic run, its job file, and what it leaves behind."""

from __future__ import annotations

import copy
import re
import time
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.arithmetic.command_line import RECIPE
from examples.arithmetic.make_data import write_data
from examples.arithmetic.settings import ArithmeticSettings
from sod_mcore.config_file import load_config
from sod_mcore.slurm.command_line import main
from sod_mcore.trajectory import RecordedBatch, recorded_batch_path
from tests.end_to_end.conftest import SMALL_DATA, configuration, noisy_student
from tests.end_to_end.programs import metrics, write_config
from tests.slurm.cluster import Job, SlurmCluster

STEPS = 3
JOB_SECONDS = 900.0
"""Longest wait for an event in a job; four engines start at once on two cores."""


@dataclass(frozen=True)
class JobRun:
    """One run folder, and the job that works in it."""

    cluster: SlurmCluster
    folder: Path
    name: str
    number: int

    @property
    def directory(self) -> Path:
        """``run.directory``."""
        return self.folder / self.name

    def log(self, attempt: int, name: str = "run.log") -> str:
        """A log of one attempt; empty before it is there."""
        path = self.directory / "slurm" / f"{self.number}.{attempt}" / name
        return path.read_text() if path.is_file() else ""

    def output(self) -> str:
        """What the batch shell of all attempts printed."""
        path = self.folder / f"{self.name}-{self.number}.out"
        return path.read_text() if path.is_file() else ""

    def wait_for_line(self, attempt: int, pattern: str) -> None:
        """Until a log of ``attempt`` has a line that matches."""
        deadline = time.monotonic() + JOB_SECONDS
        while not re.search(pattern, self.log(attempt), re.MULTILINE):
            job = self.cluster.job(self.number)
            assert not job.has_ended, self.everything()
            assert time.monotonic() < deadline, self.everything()
            time.sleep(0.1)

    def warn(self) -> None:
        """What SLURM does before the time limit."""
        self.cluster.signal_batch_shell(self.number)

    def wait_for_restart(self, restarts: int) -> None:
        """Until the job was requeued so many times and runs again."""
        self.cluster.wait(
            self.number,
            lambda job: job.has_ended or (job.restarts == restarts and job.state == "RUNNING"),
            JOB_SECONDS,
        )

    def wait_for_end(self) -> Job:
        """Until the job has ended for good."""
        return self.cluster.wait(self.number, lambda job: job.has_ended, JOB_SECONDS)

    def everything(self) -> str:
        """All logs, for the message of a failed test."""
        logs = sorted((self.directory / "slurm").rglob("*.log"))
        return self.output() + "".join(f"\n--- {p}\n{p.read_text()[-3000:]}" for p in logs)

    def prompt_order(self) -> list[list[str]]:
        """The prompts of each step, in their order."""
        recordings = self.folder / f"{self.name}_recordings"
        batches = [RecordedBatch.load(recorded_batch_path(recordings, n)) for n in range(STEPS)]
        return [list(dict.fromkeys(t.group_id for t in batch.trajectories)) for batch in batches]

    def steps(self) -> list[int]:
        """The steps of the metrics file."""
        return [line["step"] for line in metrics(self.directory)]

    def wandb_run_ids(self) -> list[str]:
        """The run id of each of W&B's files."""
        folders = (self.directory / "wandb").glob("offline-run-*")
        return [folder.name.rpartition("-")[2] for folder in folders]


def arithmetic(folder: Path) -> dict[str, Any]:
    """Student, teacher and data in ``folder``; the settings of a run over them."""
    student = noisy_student(folder / "student")
    (folder / "data").mkdir()
    write_data(folder / "data", load_config(ArithmeticSettings, RECIPE, SMALL_DATA).data)
    tree = configuration(folder, student)
    tree["run"] |= {"steps": STEPS, "export": None}
    tree["evaluation"] = {}
    # Long enough to be hit by a signal: few trajectories at a time, many small updates.
    tree["algorithm"] |= {"prompts_per_step": 16, "prompts_per_mini_batch": 1, "epochs": 4}
    tree["rollout"]["concurrency"] = 8
    return tree


def submit(
    cluster: SlurmCluster, folder: Path, name: str, tree: dict[str, Any], *options: str
) -> JobRun:
    """Write configuration and job file with ``sod slurm``, and submit the job."""
    tree = copy.deepcopy(tree)
    tree["run"]["directory"] = str(folder / name)
    tree["run"]["record"] = str(folder / f"{name}_recordings")
    if "replay" in tree["run"]:
        del tree["run"]["record"]
    config = write_config(folder / f"{name}.yaml", tree)
    script = folder / f"{name}.sbatch"
    request = ["--partition=debug", "--time=60", "--gpus-per-node=0", "--interface=lo"]
    with chdir(folder):  # where sod slurm is called, the job starts
        assert main([str(config), *options, *request, "--output", str(script)]) == 0
    return JobRun(cluster, folder, name, cluster.submit(script))
