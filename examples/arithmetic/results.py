"""The table and the picture at the end of the example, from the files that its stages left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.arithmetic.stages import read_seconds
from sod_mcore.files import write_text
from sod_mcore.report.plots import plot_run
from sod_mcore.report.step_lines import read_step_lines

_SAMPLED = "evaluation/temperature_1"
_GREEDY = "evaluation/temperature_0"


@dataclass(frozen=True)
class Row:
    """One line of the table; numbers are shares of the evaluation problems."""

    name: str
    metrics: Mapping[str, float]

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Solved at temperature 1, solved greedily, trajectories with a failed call."""
        return (
            self.metrics[f"{_SAMPLED}/accuracy"],
            self.metrics[f"{_GREEDY}/accuracy"],
            self.metrics[f"{_SAMPLED}/failed_call_share"],
        )

    def text(self) -> str:
        """The line, aligned with :data:`HEADER`."""
        return f"{self.name:<42}" + "".join(f"{number:>14.1%}" for number in self.numbers)


HEADER = f"{'':<42}{'temperature 1':>14}{'greedy':>14}{'failed calls':>14}"


def write_results(folder: Path, teacher: Path) -> str:
    """Write ``results.txt`` and ``results.png`` into ``folder``; returns the text."""
    rows = read_rows(folder, teacher)
    count = int(rows[1].metrics[f"{_SAMPLED}/num_trajectories"])
    text = "\n".join(
        [
            "",
            f"Solved, of {count} held-out problems (standard error at most "
            f"{0.5 / count**0.5:.1%}):",
            HEADER,
            *(row.text() for row in rows),
            "",
            _way_to_the_teacher(rows[0], rows[1], rows[2]),
            _seconds(folder),
            f"Curves: {folder / 'results.png'}   metrics: {folder / 'sod' / 'metrics.jsonl'}",
        ]
    )
    plot_run(folder / "sod" / "metrics.jsonl", folder / "results.png")
    write_text(folder / "results.txt", text + "\n")
    return text


def read_rows(folder: Path, teacher: Path) -> list[Row]:
    """Teacher, student before and after, and the three controls."""
    lines = read_step_lines(folder / "sod" / "metrics.jsonl")
    control = read_step_lines(folder / "controls" / "lr_0" / "metrics.jsonl")
    return [
        Row("teacher (committed)", load_metrics(teacher / "accuracy.json")),
        Row("student after its cold start", lines[0]),
        Row(f"student after {lines[-1]['step']} steps of distillation", lines[-1]),
        Row("control: the same steps, learning rate 0", control[-1]),
        Row(
            "control: fine-tuning for the same time", load_metrics(folder / "controls" / "sft.json")
        ),
        Row(
            "control: distilled, tool switched off",
            load_metrics(folder / "controls" / "no_tool.json"),
        ),
    ]


def _way_to_the_teacher(teacher: Row, before: Row, after: Row) -> str:
    """How much of the gap to the teacher was closed at temperature 1."""
    name = f"{_SAMPLED}/accuracy"
    gap = teacher.metrics[name] - before.metrics[name]
    gain = after.metrics[name] - before.metrics[name]
    return f"Distillation closed {gain / gap:.0%} of the gap to the teacher at temperature 1."


def _seconds(folder: Path) -> str:
    seconds = read_seconds(folder)
    parts = [f"{name} {value:.0f} s" for name, value in seconds.items()]
    return "Time: " + ", ".join(parts)


def load_metrics(path: Path) -> dict[str, float]:
    """The metrics that ``scripts/evaluate.py`` wrote."""
    metrics: dict[str, float] = json.loads(path.read_text())
    return metrics
