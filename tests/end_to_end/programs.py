"""Starts the package's programs as a user would, and reads what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
TEACHER = REPOSITORY / "examples" / "arithmetic" / "teacher"


def torchrun(processes: int, *command: str) -> list[str]:
    """The command line of ``processes`` ranks on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(processes), *command]


def run(
    command: Sequence[str],
    timeout_seconds: float = 300,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository; its output becomes the test's when it fails."""
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment() | dict(variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_seconds,
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {command}\n{done.stdout[-6000:]}"
    return done


def environment() -> dict[str, str]:
    """One thread a process: the tests share two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def write_config(path: Path, tree: Mapping[str, Any]) -> Path:
    """Write a configuration file."""
    path.write_text(yaml.safe_dump(dict(tree)))
    return path


def metrics(run_directory: Path) -> list[dict[str, Any]]:
    """The metric lines of a run."""
    text = (run_directory / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def training_numbers(run_directory: Path) -> list[dict[str, float]]:
    """What must be equal to the bit between equal runs: everything but times."""
    return [
        {
            name: value
            for name, value in line.items()
            if name.startswith(("step", "update/", "distillation/", "reward/"))
        }
        for line in metrics(run_directory)
        if "update/loss" in line
    ]
