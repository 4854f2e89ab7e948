"""What `sod outcome` says about runs that ended in each way."""

from pathlib import Path

import pytest
import yaml

from sod_mcore.cli import main
from sod_mcore.outcome import ENDED_FILE, Outcome, clear_outcome, read_outcome, write_outcome


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
    write_outcome(config.parent / "run", Outcome("finished", 8, "all steps are done"))
    clear_outcome(config.parent / "run")
    assert main(["outcome", str(config)]) == 1
    assert "was killed" in capsys.readouterr().out


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
