"""Runs the stages of an example one after the other; a stage whose result exists is skipped.

Each stage is one or more commands that anyone can type. Seconds are noted in ``stages.json`` beside
the results, so that a resumed run still knows what each stage took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sod_mcore.files import write_text

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@dataclass(frozen=True)
class Stage:
    """A named piece of work.

    Attributes:
        name: short name for people.
        result: file or folder that exists when the work is done, and not before.
        commands: command lines, run in order; each must end with exit code 0.
    """

    name: str
    result: Path
    commands: Sequence[Sequence[str]]


def run_stages(stages: Sequence[Stage], folder: Path) -> None:
    """Run what is not done yet; ends the process with the exit code of a command that fails."""
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        if stage.result.exists():
            print(f"{title}: {stage.result} exists, skipped", flush=True)
            continue
        print(f"{title}", flush=True)
        started = time.monotonic()
        for command in stage.commands:
            print("  $ " + " ".join(command), flush=True)
            code = subprocess.run(command, env=training_environment()).returncode
            if code != 0:
                print(f"{title}: the command ended with exit code {code}", file=sys.stderr)
                raise SystemExit(code)
        if not stage.result.exists():
            raise SystemExit(f"{title}: done, but {stage.result} is missing")
        seconds = time.monotonic() - started
        print(f"{title}: {seconds:.0f} s", flush=True)
        note_seconds(folder, stage.name, seconds)


def training_environment() -> dict[str, str]:
    """One thread a rank, and an allocator that keeps freed memory.

    Without the latter, glibc gives the memory of every large temporary back to the kernel and asks
    for it again, which took about half of the time of a training step of these small models.
    """
    allocator = {
        "MALLOC_MMAP_THRESHOLD_": "2000000000",
        "MALLOC_TRIM_THRESHOLD_": "4000000000",
        "MALLOC_TOP_PAD_": "268435456",
    }
    return {**allocator, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}


def note_seconds(folder: Path, name: str, seconds: float) -> None:
    """Add a stage's seconds to ``stages.json``."""
    write_text(
        folder / "stages.json", json.dumps({**read_seconds(folder), name: seconds}, indent=2) + "\n"
    )


def read_seconds(folder: Path) -> Mapping[str, float]:
    """Seconds of the stages run so far, by name."""
    path = folder / "stages.json"
    if not path.exists():
        return {}
    seconds: dict[str, float] = json.loads(path.read_text())
    return seconds
