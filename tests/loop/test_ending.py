"""What a start that fails says about its own end, and what it leaves of the ends before it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sod_mcore.loop.ending import Ending
from sod_mcore.outcome import Outcome, read_outcome, read_outcome_before, write_outcome

REPOSITORY = Path(__file__).parents[2]
FINISHED = Outcome("finished", 8, "all steps are done")
GOES_ON = """
import sys
from pathlib import Path
from sod_mcore.config import ConfigError
from sod_mcore.loop.ending import ending_in_order
from sod_mcore.loop.stop import StopRequest

directory = Path(sys.argv[1])
with ending_in_order(directory) as ending:
    ending.begin(StopRequest(directory / "stop", 1.0, ending.record_forced_end))
    ending.completed_steps = 9
    raise ConfigError("a wrong setting")
"""


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a run that has finished."""
    write_outcome(tmp_path, FINISHED)
    return tmp_path


def end_of(command: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a Python program."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "calls", [("starts 0", "fails 0", "fails 1"), ("fails 1", "starts 0", "fails 0")]
)
def test_refused_starts_keep_how_the_run_ended(
    finished: Path, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...]
) -> None:
    """Whichever rank is faster, and however often it is tried."""
    ranks = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        ranks[rank] = Ending(finished)
    for call in calls * 2:
        name, rank = call.split()
        if name == "starts":
            ranks[rank].set_aside()
            assert read_outcome(finished) is None, "it may be killed now"
        else:
            ranks[rank].record_failure("a wrong setting")
            assert read_outcome(finished) == Outcome("failed", 0, "a wrong setting")
        assert read_outcome_before(finished) == FINISHED


def test_a_start_that_went_on_with_the_run_does_not(finished: Path) -> None:
    code, output = end_of(["-c", GOES_ON, str(finished)])
    assert code == 2, output
    assert read_outcome(finished) == Outcome("failed", 9, "a wrong setting")
    assert read_outcome_before(finished) is None


def test_the_training_program_refuses_before_it_goes_on(finished: Path) -> None:
    tree = {
        "run": {"directory": str(finished)},
        "student": {"model_path": str(finished / "nowhere")},
        "data": {"train": "unused"},
    }
    (finished / "config.yaml").write_text(yaml.safe_dump(tree))
    code, output = end_of(["pretrain_sod.py", str(finished / "config.yaml")])
    assert code == 2, output
    outcome = read_outcome(finished)
    assert outcome is not None
    assert outcome.outcome == "failed"
    assert "nowhere" in outcome.reason
    assert read_outcome_before(finished) == FINISHED


def test_a_cause_is_not_overruled_while_others_tell_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is about to write that rank 0 failed; just then rank 0 writes why."""
    monkeypatch.setenv("RANK", "0")
    first = Ending(tmp_path)
    monkeypatch.setenv("RANK", "1")
    second = Ending(tmp_path)
    link = os.link

    def late(source: Path, target: Path) -> None:
        first.record_failure("the disk is full")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    second.record_failure("rank 0 failed", is_secondary=True)
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.reason == "the disk is full"
