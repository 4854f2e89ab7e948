"""The picture of a run, read back from the axes and from the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sod_mcore.report import plots
from sod_mcore.report.plots import PANELS, draw_run, plot_run

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


LINES: list[dict[str, float | None]] = [
    {
        "step": 0,
        "evaluation/temperature_1/accuracy": 0.4,
        "evaluation/temperature_0/accuracy": 0.6,
    },
    {"step": 1, "distillation/reverse_kl": 0.9, "distillation/mean_d_k": 0.8},
    {"step": 2, "distillation/reverse_kl": None, "distillation/mean_d_k": 0.7},
    {"step": 3, "distillation/reverse_kl": 0.5, "distillation/mean_w_k": 0.6},
    {"step": 3, "evaluation/temperature_1/accuracy": 0.7},
]


def write_metrics(path: Path) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_the_curves_are_the_metrics() -> None:
    figure = draw_run(LINES)
    curves = [
        {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
        for axes in figure.axes
    ]
    assert curves[0] == {"temperature 1": [[0.0, 0.4], [3.0, 0.7]], "greedy": [[0.0, 0.6]]}
    assert [list(panel.values()) for panel in curves[1:]] == [
        [[[1.0, 0.9], [3.0, 0.5]]],
        [[[1.0, 0.8], [2.0, 0.7]]],
        [[[3.0, 0.6]]],
    ]
    assert [axes.get_title() for axes in figure.axes] == [panel.title for panel in PANELS]
    assert figure.axes[0].get_ylim() == (0, 1)


def test_the_picture_is_a_png_in_a_new_folder(tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "run.png"
    plot_run(write_metrics(tmp_path / "metrics.jsonl"), picture)
    assert picture.read_bytes().startswith(PNG_SIGNATURE)
    assert list(picture.parent.iterdir()) == [picture]


def test_nothing_to_plot_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "other": 1.0, "distillation/reverse_kl": null}\n')
    with pytest.raises(ValueError, match="holds nothing to plot"):
        plot_run(metrics, tmp_path / "run.png")
    with pytest.raises(ValueError, match="holds nothing to plot"):
        plot_run(tmp_path / "absent.jsonl", tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_a_failed_drawing_keeps_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "run.png"
    picture.write_bytes(b"old")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(plots, "_draw", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_run(write_metrics(tmp_path / "metrics.jsonl"), picture)
    assert picture.read_bytes() == b"old"
