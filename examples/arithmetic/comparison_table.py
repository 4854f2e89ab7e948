"""The tables of the comparison, from the files that its cells left.

Accuracies and failing calls come from the evaluation after training; divergences and weights are
means over the steps of training, since that is where they act.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from examples.arithmetic.cells import METHODS, SFT, Cell
from examples.arithmetic.results import load_metrics
from examples.arithmetic.stages import read_seconds
from sod_mcore.report.step_lines import read_step_lines

Metrics = Mapping[str, float]

ABSENT = "–"
_SAMPLED, _GREEDY = "evaluation/temperature_1", "evaluation/temperature_0"
_TURNS = (1, 2, 3, 4)
_KINDS: Mapping[str, str] = {
    "call succeeds": "call_succeeded",
    "call fails": "call_failed",
    "answer": "no_call",
    "after a failure": "after_failure",
}
"""Kinds of turns that a run's metrics tell apart by the outcome of tool calls."""


def comparison_table(cells: Sequence[Cell]) -> str:
    """Markdown: outcome, divergence by turn and by outcome, each as mean ± standard error."""
    trained: dict[str, list[Metrics]] = {}
    for cell in cells:
        trained.setdefault(METHODS[cell.method], []).append(read_cell(cell))
    untrained: dict[str, list[Metrics]] = {
        "teacher (committed)": [load_metrics(cells[0].experiment.teacher / "accuracy.json")],
        "cold start": _cold_starts(cells),
    }
    return "\n".join(
        [
            _table(_OUTCOMES, {**untrained, **trained}),
            _table(_BY_TURN, trained),
            _table(_BY_OUTCOME, trained),
        ]
    )


def read_cell(cell: Cell) -> Metrics:
    """The last evaluation, the means over training, and the seconds of a cell."""
    noted = read_seconds(cell.experiment.folder)
    seconds = {"seconds": noted[cell.method]} if cell.method in noted else {}
    if cell.method == SFT:
        return {**load_metrics(cell.metrics), **seconds}
    lines = read_step_lines(cell.metrics)
    scored = [_select(line, "distillation/") for line in lines] if cell.is_scored else []
    return {**_means(scored), **_select(lines[-1], "evaluation/"), **seconds}


def mean_and_error(values: Sequence[float], form: str) -> str:
    """Mean ± standard error over seeds; a single value stands alone.

    Args:
        values: one a seed.
        form: of a number, as in a format string; a percent sign turns shares into percentages.
    """
    if not values:
        return ABSENT
    factor, unit = (100.0, "%") if form.endswith("%") else (1.0, "")
    form = form.replace("%", "f")
    mean = format(factor * fmean(values), form)
    if len(values) == 1:
        return mean + unit
    error = format(factor * stdev(values) / len(values) ** 0.5, form)
    return f"{mean} ± {error}{unit}"


_Column = tuple[str, str, str]
"""Heading, metric, format."""

_OUTCOMES: Sequence[_Column] = (
    ("solved, temperature 1", f"{_SAMPLED}/accuracy", ".1%"),
    ("solved, greedy", f"{_GREEDY}/accuracy", ".1%"),
    ("calls that fail", f"{_SAMPLED}/failed_calls", ".1%"),
    ("trajectories with a failed call", f"{_SAMPLED}/failed_call_share", ".1%"),
    ("seconds", "seconds", ".0f"),
)
_BY_TURN: Sequence[_Column] = tuple(
    (f"{symbol}_{k}", f"distillation/{symbol}_{k}", ".3f") for symbol in "dw" for k in _TURNS
)
_BY_OUTCOME: Sequence[_Column] = tuple(
    (f"{symbol}_k, {heading}", f"distillation/{symbol}_k/{kind}", ".3f")
    for symbol in "dw"
    for heading, kind in _KINDS.items()
)


def _table(columns: Sequence[_Column], rows: Mapping[str, Sequence[Metrics]]) -> str:
    """Markdown; a row without any of the columns' numbers is left out."""
    lines = [("", *(heading for heading, _, _ in columns)), ("---",) * (len(columns) + 1)]
    for name, metrics in rows.items():
        texts = [
            mean_and_error([m[metric] for m in metrics if metric in m], form)
            for _, metric, form in columns
        ]
        if any(text != ABSENT for text in texts):
            lines.append((name, *texts))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cold_starts(cells: Sequence[Cell]) -> list[Metrics]:
    """For each seed, the mean over its runs' evaluations before training: equal weights, but other
    samples at temperature 1."""
    before: dict[int, list[Metrics]] = {}
    for cell in cells:
        if cell.method != SFT:
            first = read_step_lines(cell.metrics)[0]
            before.setdefault(cell.experiment.seed, []).append(_select(first, "evaluation/"))
    return [_means(evaluations) for evaluations in before.values()]


def _select(line: Mapping[str, Any], prefix: str) -> Metrics:
    return {
        name: value for name, value in line.items() if name.startswith(prefix) and value is not None
    }


def _means(lines: Sequence[Metrics]) -> Metrics:
    """Of each metric, over the lines that have it."""
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: fmean(line[name] for line in lines if name in line) for name in names}
