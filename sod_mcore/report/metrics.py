"""The metrics of a run: one JSON line a step in the run's folder, mirrored to W&B.

``metrics.jsonl`` and ``trajectories.jsonl`` are the run's record; W&B shows the same and may fail.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sod_mcore.config import ReportConfig
from sod_mcore.report.step_lines import StepLines
from sod_mcore.report.trajectory_table import (
    WANDB_COLUMNS,
    TrajectoryRow,
    row_as_line,
    wandb_rows,
)
from sod_mcore.report.wandb_mirror import WandbMirror, require_wandb

__all__ = ["METRICS_FILE", "TRAJECTORIES_FILE", "MetricsLog", "require_wandb"]

METRICS_FILE = "metrics.jsonl"
TRAJECTORIES_FILE = "trajectories.jsonl"


class MetricsLog:
    """Where global rank 0 writes what a step measured.

    A resumed run passes the first step that it will train as ``first_step``; lines of that step and
    later ones are cut off, so that each step appears once.
    """

    def __init__(
        self,
        directory: Path,
        report: ReportConfig,
        resolved_config: Mapping[str, Any],
        run_id: str | None = None,
        *,
        first_step: int = 0,
    ) -> None:
        """Open the files in ``directory`` and start W&B.

        Args:
            directory: the run's folder; made if missing.
            report: W&B mode, project and name.
            resolved_config: all settings as used, for W&B.
            run_id: W&B id of a new run; an id that the folder already holds wins. None makes one.
            first_step: lines of this step and later are removed; 0 begins new files.

        Raises:
            ConfigError: W&B is asked for and not installed.
            ValueError: a file of an earlier start is damaged before its last line.
        """
        require_wandb(report)
        self._metrics = StepLines(directory / METRICS_FILE, first_step=first_step)
        self._trajectories = StepLines(directory / TRAJECTORIES_FILE, first_step=first_step)
        self._wandb = WandbMirror(directory, report, resolved_config, run_id)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the line of ``step``; it is on disk on return.

        A second call for the last step (its evaluation, say) adds to that step's line.

        Args:
            step: training step, not below that of the last line.
            metrics: numbers, truth values or text by name; numpy and torch scalars may be given.

        Raises:
            ValueError: ``step`` is below the last one, or a metric is named "step" or "time".
        """
        if taken := {"step", "time"} & set(metrics):
            raise ValueError(f"metrics may not be named {sorted(taken)}: the line has these itself")
        line = {"step": step, "time": time.time(), **metrics}
        last = self._metrics.last
        if last is not None and step < last["step"]:
            raise ValueError(f"step {step} comes after step {last['step']} in {METRICS_FILE}")
        if last is not None and step == last["step"]:
            self._metrics.replace_last({**last, **line})
        else:
            self._metrics.append([line])
        self._wandb.log(step, metrics)

    def log_trajectories(self, rows: Sequence[TrajectoryRow]) -> None:
        """Write sampled trajectories of one step, before anything of a later step is logged."""
        if not rows:
            return
        self._trajectories.append([row_as_line(row) for row in rows])
        self._wandb.log_table(rows[0].step, "trajectories", WANDB_COLUMNS, wandb_rows(rows))

    def close(self) -> None:
        """End the W&B run. The files need no closing."""
        self._wandb.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
