"""How a run ended, in a file of its own, for the programs that start runs and start them again.

torchrun cannot pass on what its ranks say: it ends with 1 after a signal, even when every rank has
saved and ended in order. So global rank 0 takes ``ended.json`` away when it starts and writes it
when it ends; a process that was killed leaves none. A start that ends before it has changed the run
still is the last start, so it is what ``ended.json`` tells; how the run ended before is kept beside
it, until a start goes on with the run.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sod_mcore.files import create_text, naming, write_text

ENDED_FILE = "ended.json"
ENDED_BEFORE_FILE = "ended_before.json"
RESERVE_FILE = ".ended.reserve"
RESERVE_BYTES = 16 << 10
"""Four blocks of usual size: a file and its temporary copy, of two ranks."""
EXIT_FAILED = 1
EXIT_STOPPED = 75
"""Exit code of a run that was stopped, has saved, and wants to be started again.

It is sysexits.h's EX_TEMPFAIL, which nothing else here ends with.
"""


@dataclass(frozen=True)
class Outcome:
    """The end of one start of a run.

    Attributes:
        outcome: "finished" all its steps; "stopped" when asked to, and saved: the same command
            continues; "failed".
        completed_steps: training steps that are done; a failed run may have saved fewer.
        reason: one line for people.
    """

    outcome: Literal["finished", "stopped", "failed"]
    completed_steps: int
    reason: str

    @property
    def exit_code(self) -> int:
        """0 for finished, :data:`EXIT_STOPPED` for stopped, :data:`EXIT_FAILED` for failed."""
        return {"finished": 0, "stopped": EXIT_STOPPED, "failed": EXIT_FAILED}[self.outcome]


def reserve_outcome(directory: Path) -> None:
    """Keep room for ``ended.json``, so that a disk that fills up does not hide how the run ended.

    Raises:
        OSError: the disk is full already, for instance.
    """
    path = directory / RESERVE_FILE
    with naming(path):
        directory.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(RESERVE_BYTES))


def write_outcome(directory: Path, outcome: Outcome) -> None:
    """Write ``directory/ended.json`` atomically, in the room of :func:`reserve_outcome` if any.

    Raises:
        OSError: the disk is full, for instance.
    """
    (directory / RESERVE_FILE).unlink(missing_ok=True)
    write_text(directory / ENDED_FILE, _text_of(outcome))


def suggest_outcome(directory: Path, outcome: Outcome) -> None:
    """The same where nothing is written yet, for ranks that saw only what another's end did.

    Raises:
        OSError: the disk is full, for instance.
    """
    (directory / RESERVE_FILE).unlink(missing_ok=True)
    create_text(directory / ENDED_FILE, _text_of(outcome))


def read_outcome(directory: Path) -> Outcome | None:
    """How the last start in ``directory`` ended; None while it runs, and if it was killed.

    Raises:
        ValueError: the file was not written by :func:`write_outcome`.
    """
    return _read(directory / ENDED_FILE)


def read_outcome_before(directory: Path) -> Outcome | None:
    """How the run ended before starts that did not go on with it; None if one did.

    Raises:
        ValueError: the file was not written by :func:`write_outcome`.
    """
    return _read(directory / ENDED_BEFORE_FILE)


def set_outcome_aside(directory: Path) -> None:
    """Take away what an earlier start left; that it finished or saved stays known."""
    path = directory / ENDED_FILE
    try:
        outcome = read_outcome(directory)
    except ValueError:
        outcome = None
    if outcome is not None and outcome.outcome != "failed":
        path.replace(directory / ENDED_BEFORE_FILE)
    else:
        path.unlink(missing_ok=True)


def forget_outcome_before(directory: Path) -> None:
    """A start goes on with the run, so what :func:`set_outcome_aside` kept is past."""
    (directory / ENDED_BEFORE_FILE).unlink(missing_ok=True)


def _text_of(outcome: Outcome) -> str:
    return json.dumps(dataclasses.asdict(outcome)) + "\n"


def _read(path: Path) -> Outcome | None:
    try:
        return Outcome(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it") from error
