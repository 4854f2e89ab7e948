"""What `sod outcome` says about runs that ended in each way."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sod_mcore.cli import main
from sod_mcore.outcome import (
    ENDED_FILE,
    Outcome,
    forget_outcome_before,
    read_outcome,
    read_outcome_before,
    set_outcome_aside,
    write_outcome,
)
from tests.end_to_end.small_disk import small_disk

ON_A_FULL_DISK = """
import os, sys
from pathlib import Path
from sod_mcore.outcome import Outcome, reserve_outcome, suggest_outcome, write_outcome

disk, ways = Path(sys.argv[1]), sys.argv[2:]
if "reserve" in ways:
    reserve_outcome(disk)
with (disk / "filler").open("wb") as file:
    free = os.statvfs(disk)
    os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_bsize)
if "suggest" in ways:
    suggest_outcome(disk, Outcome("failed", 1, "another rank is gone"))
write_outcome(disk, Outcome("failed", 2, "the disk is full"))
"""
FINISHED = Outcome("finished", 8, "all steps are done")
REFUSED = Outcome("failed", 0, "data.train is nowhere: no such file")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tree = {
        "run": {"directory": str(tmp_path / "run")},
        "student": {"model_path": "unused"},
        "data": {"train": "unused"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        (Outcome("finished", 8, "all steps are done"), 0, "finished after 8 steps: all steps"),
        (Outcome("stopped", 3, "SIGTERM"), 75, "stopped after 3 steps: SIGTERM"),
        (Outcome("failed", 2, "the disk is full"), 1, "failed after 2 steps: the disk is full"),
    ],
)
def test_exit_code_and_line(
    config: Path, outcome: Outcome, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_outcome(config.parent / "run", outcome)
    assert main(["outcome", str(config)]) == code
    assert capsys.readouterr().out.startswith(line)


def test_no_file_is_a_failure(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_outcome(config.parent / "run", REFUSED)
    set_outcome_aside(config.parent / "run")
    assert main(["outcome", str(config)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "was killed" in lines[0]


@pytest.mark.parametrize("before", [FINISHED, Outcome("stopped", 3, "SIGTERM")])
def test_refused_starts_do_not_hide_how_the_run_ended(
    config: Path, before: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config.parent / "run"
    write_outcome(run, before)
    for _ in range(2):
        set_outcome_aside(run)
        write_outcome(run, REFUSED)
        assert main(["outcome", str(config)]) == 1, "the last start failed"
        assert capsys.readouterr().out.splitlines() == [
            "failed after 0 steps: data.train is nowhere: no such file",
            "that start has not gone on with the run; before it: "
            f"{before.outcome} after {before.completed_steps} steps: {before.reason}",
        ]
    forget_outcome_before(run)
    assert read_outcome_before(run) is None
    assert main(["outcome", str(config)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_damaged_file_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / ENDED_FILE).write_text("{}")
    set_outcome_aside(tmp_path)
    assert not list(tmp_path.iterdir())


def test_overrides_choose_the_run(config: Path, tmp_path: Path) -> None:
    write_outcome(tmp_path / "other", Outcome("stopped", 3, "SIGTERM"))
    assert main(["outcome", str(config), f"run.directory={tmp_path / 'other'}"]) == 75


def test_a_damaged_file_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "run").mkdir()
    (config.parent / "run" / ENDED_FILE).write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main(["outcome", str(config)])
    assert ended.value.code == 2
    assert "ended.json cannot be read" in capsys.readouterr().err


def test_round_trip(tmp_path: Path) -> None:
    outcome = Outcome("stopped", 3, "the file run/stop")
    write_outcome(tmp_path, outcome)
    assert read_outcome(tmp_path) == outcome


@pytest.mark.parametrize("ways", [("reserve",), ("reserve", "suggest"), ()])
def test_a_disk_that_fills_up_does_not_hide_the_end(ways: tuple[str, ...], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=256) as disk:
        command = [sys.executable, "-c", ON_A_FULL_DISK, str(disk.mount), *ways]
        done = subprocess.run(
            disk.inside(command), capture_output=True, text=True, timeout=60, check=False
        )
        found = read_outcome(disk.seen_from_outside)
        left = {path.name for path in disk.seen_from_outside.iterdir()}
    if ways:
        assert found == Outcome("failed", 2, "the disk is full"), done.stderr
        assert left == {"filler", ENDED_FILE}
    else:
        assert "No space left on device" in done.stderr, "else the test shows nothing"
        assert found is None
