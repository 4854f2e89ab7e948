"""The picture of a run: accuracy, reverse KL, mean ``d_k`` and mean ``w_k`` over steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sod_mcore.files import atomic_file
from sod_mcore.report.step_lines import Line, read_step_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """One set of axes: metric names in ``metrics.jsonl`` and the labels of their curves."""

    title: str
    curves: dict[str, str]
    between_zero_and_one: bool = False


PANELS = (
    Panel(
        "accuracy on the evaluation set",
        {
            "evaluation/temperature_1/accuracy": "temperature 1",
            "evaluation/temperature_0/accuracy": "greedy",
        },
        between_zero_and_one=True,
    ),
    Panel("reverse KL of sampled tokens (nats)", {"distillation/reverse_kl": ""}),
    Panel("mean step divergence $d_k$ (nats)", {"distillation/mean_d_k": ""}),
    Panel("mean step weight $w_k$", {"distillation/mean_w_k": ""}),
)


def plot_run(metrics_path: Path, out_png: Path) -> None:
    """Draw the metrics of a run.

    Args:
        metrics_path: ``metrics.jsonl`` of the run.
        out_png: the picture; replaced only when the new one is complete.

    Raises:
        ValueError: the file holds none of the metrics in :data:`PANELS`.
        ImportError: matplotlib is not installed (extra ``examples``).
    """
    lines = read_step_lines(metrics_path)
    names = [name for panel in PANELS for name in panel.curves]
    if not any(line.get(name) is not None for line in lines for name in names):
        raise ValueError(f"{metrics_path} holds nothing to plot; it must have one of: {names}")
    figure = draw_run(lines)
    with atomic_file(out_png) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_run(lines: Sequence[Line]) -> Figure:
    """One set of axes for each of :data:`PANELS`, drawn without a display (Agg)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw(axes, panel, lines)
    return figure


def _draw(axes: Any, panel: Panel, lines: Sequence[Line]) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel("training step")
    axes.grid(alpha=0.3)
    for name, label in panel.curves.items():
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker="o", markersize=3, label=label)
    if any(panel.curves.values()) and axes.lines:
        axes.legend()
    if panel.between_zero_and_one:
        axes.set_ylim(0, 1)
