"""What a run tells people: metrics on disk and in W&B, tables of trajectories, plots, progress."""

from sod_mcore.report.metrics import MetricsLog, require_wandb
from sod_mcore.report.plots import plot_run
from sod_mcore.report.progress import Progress
from sod_mcore.report.step_timeline import StepTimeline
from sod_mcore.report.summary import summarise_rollout
from sod_mcore.report.trajectory_table import (
    TrajectoryRow,
    TurnRow,
    describe_trajectory,
    format_rows,
    pick_evenly,
)

__all__ = [
    "MetricsLog",
    "Progress",
    "StepTimeline",
    "TrajectoryRow",
    "TurnRow",
    "describe_trajectory",
    "format_rows",
    "pick_evenly",
    "plot_run",
    "require_wandb",
    "summarise_rollout",
]
