"""Runs the stages of an example one after the other; a stage whose result exists is skipped.

Each stage is one or more commands that anyone can type. Seconds are noted in ``stages.json`` beside
the results, so that a resumed run still knows what each stage took.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sod_mcore.files import write_text


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


def run_stages(stages: Sequence[Stage], folder: Path, *, passes_on_ctrl_c: bool = False) -> None:
    """Run what is not done yet; ends the process with the exit code of a command that fails.

    Args:
        stages: in order.
        folder: where ``stages.json`` is.
        passes_on_ctrl_c: whether commands do not get Ctrl-C from the terminal themselves.
    """
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        if stage.result.exists():
            print(f"{title}: {stage.result} exists, skipped", flush=True)
            continue
        print(f"{title}", flush=True)
        started = time.monotonic()
        for command in stage.commands:
            print("  $ " + " ".join(command), flush=True)
            code = run_command(command, passes_on_ctrl_c)
            if code != 0:
                print(f"{title}: the command ended with exit code {code}", file=sys.stderr)
                raise SystemExit(code)
        if not stage.result.exists():
            raise SystemExit(f"{title}: done, but {stage.result} is missing")
        seconds = time.monotonic() - started
        print(f"{title}: {seconds:.0f} s", flush=True)
        note_seconds(folder, stage.name, seconds)


def run_command(command: Sequence[str], passes_on_ctrl_c: bool) -> int:
    """Run a command and return its exit code; it is given the time to save what it has.

    Ctrl-C in a terminal reaches the command by itself; a second one from here would end it at once.
    """
    with subprocess.Popen(command, env=training_environment()) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            if number != signal.SIGINT or passes_on_ctrl_c:
                process.send_signal(number)

        before = {
            number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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
