"""The metrics log: one line a step whatever happens, and W&B that mirrors but never matters."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sod_mcore.config import ConfigError, ReportConfig
from sod_mcore.report import wandb_mirror
from sod_mcore.report.metrics import MetricsLog, require_wandb
from sod_mcore.report.step_lines import read_step_lines
from sod_mcore.report.trajectory_table import TrajectoryRow, TurnRow

REPOSITORY = Path(__file__).parents[2]
QUIET = ReportConfig(wandb="disabled")
TURNS = (TurnRow(1, 5, 0.5, 1.0, "ok"), TurnRow(2, 3, float("nan"), 0.3, "none"))
ROW = TrajectoryRow(2, "p1", "chain_sum", 1.0, True, "answer", TURNS)


@pytest.fixture(autouse=True)
def _wandb_folders_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log sets these where they are not set; no test may leave them to the next."""
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))


def open_log(directory: Path, report: ReportConfig = QUIET, first_step: int = 0) -> MetricsLog:
    return MetricsLog(directory, report, {"run": {"steps": 3}}, first_step=first_step)


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """The lines as any JSON reader sees them, without their times."""
    lines = [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("time") > 0 for line in lines)
    return lines


def test_each_step_is_one_line_of_plain_numbers(tmp_path: Path) -> None:
    with open_log(tmp_path / "run") as log:
        log.log(0, {"a": 1, "b": np.float32(0.5), "c": torch.tensor(2.0), "d": "text", "e": True})
        log.log(3, {"a": float("nan"), "b": -np.inf})
    assert metrics_of(tmp_path / "run") == [
        {"step": 0, "a": 1, "b": 0.5, "c": 2.0, "d": "text", "e": True},
        {"step": 3, "a": None, "b": None},
    ]


def test_a_line_is_on_disk_before_the_process_ends(tmp_path: Path) -> None:
    """Nothing waits in a buffer: a process that is killed has written what it logged."""
    program = f"""
        import os, signal
        from pathlib import Path
        from sod_mcore.config import ReportConfig
        from sod_mcore.report.metrics import MetricsLog
        log = MetricsLog(Path({str(tmp_path)!r}), ReportConfig(wandb="disabled"), {{}})
        log.log(1, {{"a": 2.5}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = _run_python(program)
    assert result.returncode == -9
    assert metrics_of(tmp_path) == [{"step": 1, "a": 2.5}]


def test_a_second_call_for_the_last_step_adds_to_its_line(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.log(1, {"loss": 3.0})
    log.log(2, {"loss": 2.0})
    log.log(2, {"accuracy": 0.5})
    log.log(3, {"loss": 1.0})
    assert metrics_of(tmp_path) == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0, "accuracy": 0.5},
        {"step": 3, "loss": 1.0},
    ]


def test_a_resumed_run_leaves_each_step_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in range(6):
        log.log(step, {"loss": float(step)})
        log.log_trajectories([ROW] if step == 2 else [])
    resumed = open_log(tmp_path, first_step=4)
    resumed.log(3, {"accuracy": 0.5})
    for step in (4, 5, 6):
        resumed.log(step, {"loss": 10.0 + step})
    assert [(line["step"], line["loss"]) for line in metrics_of(tmp_path)] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0), (5, 15.0), (6, 16.0),
    ]  # fmt: skip
    assert metrics_of(tmp_path)[3]["accuracy"] == 0.5
    assert len(read_step_lines(tmp_path / "trajectories.jsonl")) == 1
    open_log(tmp_path, first_step=2)
    assert read_step_lines(tmp_path / "trajectories.jsonl") == []


def test_a_run_from_the_start_begins_new_files(tmp_path: Path) -> None:
    open_log(tmp_path).log(5, {"loss": 1.0})
    open_log(tmp_path).log(0, {"loss": 2.0})
    assert metrics_of(tmp_path) == [{"step": 0, "loss": 2.0}]


def test_a_last_line_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    open_log(tmp_path).log(0, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    open_log(tmp_path, first_step=2).log(2, {"loss": 3.0})
    assert metrics_of(tmp_path) == [{"step": 0, "loss": 1.0}, {"step": 2, "loss": 3.0}]


def test_a_damaged_line_in_the_middle_is_refused_by_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnoise\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON with a step"):
        open_log(tmp_path, first_step=3)


def test_steps_do_not_go_back(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.log(4, {})
    with pytest.raises(ValueError, match="step 3 comes after step 4"):
        log.log(3, {})


def test_the_lines_own_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['step', 'time'\]"):
        open_log(tmp_path).log(0, {"step": 1, "time": 2.0})


def test_trajectories_are_lines_with_null_for_nan(tmp_path: Path) -> None:
    open_log(tmp_path).log_trajectories([ROW])
    (line,) = read_step_lines(tmp_path / "trajectories.jsonl")
    assert line["group_id"] == "p1"
    assert line["turns"][0] == {
        "turn": 1, "tokens": 5, "divergence": 0.5, "weight": 1.0, "tool": "ok",
    }  # fmt: skip
    assert line["turns"][1]["divergence"] is None


def test_a_missing_wandb_is_one_clear_line_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_mirror.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"report\.wandb is 'offline', but the package wandb is not"
    ):
        open_log(tmp_path, ReportConfig())
    assert not (tmp_path / "metrics.jsonl").exists()
    require_wandb(QUIET)
    open_log(tmp_path).log(0, {"loss": 1.0})


def test_wandb_that_breaks_is_a_warning_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    class Broken:
        def log(self, *args: object, **kwargs: object) -> None:
            raise OSError("no space left on device")

    monkeypatch.setattr(wandb, "init", lambda **kwargs: Broken())
    with caplog.at_level(logging.WARNING), open_log(tmp_path, ReportConfig()) as log:
        log.log(0, {"loss": 1.0})
        log.log(1, {"loss": 2.0})
        log.log_trajectories([ROW])
    assert len(metrics_of(tmp_path)) == 2
    assert [record.message for record in caplog.records] == [
        "W&B log failed; the run goes on without W&B: no space left on device"
    ]


def test_wandb_that_does_not_start_falls_back_to_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    modes = []

    def init(**settings: Any) -> None:
        modes.append(settings["mode"])
        raise wandb.errors.CommError("unreachable")

    monkeypatch.setattr(wandb, "init", init)
    with caplog.at_level(logging.WARNING), open_log(tmp_path, ReportConfig(wandb="online")) as log:
        log.log(0, {"loss": 1.0})
    assert modes == ["online", "offline"]
    assert "kept offline" in caplog.text
    assert len(metrics_of(tmp_path)) == 1


LOG_TO_WANDB = """
    import sys
    from pathlib import Path
    from sod_mcore.config import ReportConfig
    from sod_mcore.report.metrics import MetricsLog
    from sod_mcore.report.trajectory_table import TrajectoryRow, TurnRow
    first_step = int(sys.argv[2])
    report = ReportConfig(project="distillation", name="tiny")
    turns = (TurnRow(1, 5, 0.5, 1.0, "ok"),)
    row = TrajectoryRow(first_step, "p1", "s", 1.0, True, "answer", turns)
    config = {"run": {"steps": 7}}
    with MetricsLog(Path(sys.argv[1]), report, config, first_step=first_step) as log:
        log.log_trajectories([row])
        log.log(first_step, {"train/loss": 0.12345})
        log.log(first_step + 1, {"train/loss": 0.6789})
"""


def test_real_wandb_writes_offline_files_under_the_run_and_keeps_its_id(tmp_path: Path) -> None:
    """Two starts of one run folder, with the real package: same id, files nowhere else."""
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "WANDB_SILENT": "true"}
    first = _run_python(LOG_TO_WANDB, str(run), "0", **environment)
    assert first.returncode == 0, first.stderr
    run_id = (run / "wandb_run_id").read_text().strip()
    second = _run_python(LOG_TO_WANDB, str(run), "2", **environment)
    assert second.returncode == 0, second.stderr
    assert (run / "wandb_run_id").read_text().strip() == run_id
    stored = sorted(run.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(stored) == 2
    for path in stored:
        content = path.read_bytes()
        assert b"train/loss" in content
        assert b"0.12345" in content
        assert b"0.6789" in content
        assert list(path.parent.glob("files/media/table/trajectories*.table.json"))
    assert b"distillation" in stored[0].read_bytes()
    assert [line["step"] for line in metrics_of(run)] == [0, 1, 2, 3]
    assert [path for path in home.rglob("*") if path.is_file()] == []


def _run_python(program: str, *arguments: str, **environment: str) -> Any:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        cwd=REPOSITORY,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
