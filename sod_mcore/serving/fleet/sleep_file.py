"""Which engines a trainer has put to sleep: ``serving/asleep.json``, written by it, for the fleet.

While the trainer works on the engines' GPUs the fleet starts none again, for it would come up
awake; and engines that a trainer has left asleep are started again, for nobody else would wake
them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sod_mcore.files import write_text
from sod_mcore.serving.endpoints import process_start_ticks


@dataclass(frozen=True)
class SleepRecord:
    """What a trainer says about the engines.

    Attributes:
        pid: of the trainer's rank 0, which runs on this machine.
        process_start: its kernel start time in clock ticks; tells it from a later process.
        is_training: whether the GPUs are the trainer's.
        engines: by base URL, which process of the fleet was put to sleep (its incarnation).
    """

    pid: int
    process_start: int
    is_training: bool
    engines: Mapping[str, int]

    @property
    def is_orphaned(self) -> bool:
        """Whether the trainer has ended."""
        return process_start_ticks(self.pid) != self.process_start


def sleep_path(directory: Path) -> Path:
    """The file; ``directory`` is ``run.directory`` or ``serving.directory``."""
    return directory / "serving" / "asleep.json"


def write_sleep(directory: Path, engines: Mapping[str, int], *, is_training: bool) -> None:
    """Record this process as the trainer; without engines and training the file goes."""
    path = sleep_path(directory)
    if not engines and not is_training:
        path.unlink(missing_ok=True)
        return
    start = process_start_ticks(os.getpid()) or 0
    record = SleepRecord(os.getpid(), start, is_training, dict(engines))
    write_text(path, json.dumps(asdict(record)))


def read_sleep(directory: Path) -> SleepRecord | None:
    """What the last trainer said; None if all engines are awake."""
    try:
        return SleepRecord(**json.loads(sleep_path(directory).read_text()))
    except FileNotFoundError:
        return None
