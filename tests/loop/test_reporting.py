"""What a step's line and trace hold when the reporter has been told all of the step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from sod_mcore.algorithm.signals import compute_signals
from sod_mcore.config import SodConfig
from sod_mcore.loop.reporting import Reporter
from sod_mcore.report import StepTimeline
from sod_mcore.timeline import SpanRecorder
from sod_mcore.trajectory import RecordedBatch
from tests.evaluation.fakes import answered, data_set


def make_config(directory: Path, trace_every: int) -> SodConfig:
    tree = {
        "run": {"directory": str(directory)},
        "student": {"model_path": "models/student"},
        "data": {"train": "train.parquet"},
        "report": {"wandb": "disabled", "trace_every": trace_every},
    }
    return TypeAdapter(SodConfig).validate_python(tree)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]


def scored_batch() -> RecordedBatch:
    """Three trajectories of one problem, each with its teacher's scores."""
    (prompt,) = data_set("aime", 1).prompts
    trajectory = answered(prompt)
    scores = np.where(trajectory.loss_mask, -0.5, np.nan).astype(np.float32)
    return RecordedBatch((trajectory.with_teacher(scores),) * 3, step=0, weight_version=0)


def test_times_of_trainer_and_pool_stand_in_the_steps_line(tmp_path: Path) -> None:
    config, batch = make_config(tmp_path, trace_every=1), scored_batch()
    timeline = StepTimeline(tmp_path, trace_every=config.report.trace_every)
    time.sleep(0.2)  # the model is built: no step's time
    pool, start = SpanRecorder(), time.monotonic()
    with Reporter.open(config, 0, timeline) as reporter:
        with reporter.timed("rollout"):
            with pool.span("generate"):
                time.sleep(0.1)
            timeline.add(pool.take())
        with reporter.timed("updates"):
            time.sleep(0.05)
        with reporter.timed("updates"):
            time.sleep(0.05)
        logprobs = [t.rollout_logprobs for t in batch.trajectories]
        signals = compute_signals(batch.trajectories, logprobs, config.algorithm)
        reporter.step(0, batch, signals, [])
        reporter.end_line(1)
        seconds = time.monotonic() - start
        reporter.end_line(2)
    line, empty = lines(tmp_path)
    assert 0.2 < line["time/step"] <= seconds
    assert 0.1 < line["time/rollout"] < line["time/step"] - line["time/updates"]
    assert line["time/updates"] > 0.1
    assert 0.1 < line["timeline/generate_seconds"] < line["time/rollout"] + 1e-3
    assert line["timeline/trainer_idle_share"] == pytest.approx(
        line["time/rollout"] / line["time/step"]
    )
    assert line["timeline/trajectories_per_second"] == pytest.approx(3 / line["time/step"])
    # The next line trained nothing, and nothing of the step before is in it.
    assert empty["timeline/trajectories_per_second"] == empty["timeline/generate_seconds"] == 0.0
    assert "time/updates" not in empty
    events = json.loads((tmp_path / "timeline" / "step_000001.json").read_text())["traceEvents"]
    spans = [event["name"] for event in events if event["ph"] == "X"]
    assert spans == ["step 1", "rollout", "updates", "updates", "generate"]


def test_no_trace_is_written_unless_asked_for(tmp_path: Path) -> None:
    config = make_config(tmp_path, trace_every=0)
    timeline = StepTimeline(tmp_path, trace_every=config.report.trace_every)
    with Reporter.open(config, 0, timeline) as reporter:
        reporter.end_line(1)
    assert "timeline/rollout_idle_share" in lines(tmp_path)[0]
    assert not (tmp_path / "timeline").exists()
