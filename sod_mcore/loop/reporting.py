"""What a run tells: metrics of each step, sampled trajectories, progress, times of each phase.

Line ``n`` of the metrics belongs to the weights after ``n`` steps: the training metrics of the step
that made them and, where one was due, their evaluation. Line 0 holds the evaluation before
training. Only global rank 0 has a reporter.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from sod_mcore.algorithm.signals import BatchSignals
from sod_mcore.config import SodConfig
from sod_mcore.report.metrics import MetricsLog
from sod_mcore.report.progress import Progress
from sod_mcore.report.step_outcomes import StepValues, metrics_by_outcome
from sod_mcore.report.step_timeline import StepTimeline
from sod_mcore.report.summary import summarise_rollout
from sod_mcore.report.trajectory_table import describe_trajectory, format_rows, pick_evenly
from sod_mcore.rollout.request import RolloutProgress
from sod_mcore.student.student import UpdateResult
from sod_mcore.trajectory import RecordedBatch

Item = TypeVar("Item")


class Reporter:
    """Collects the metrics of a step and writes them as one line when the step is over."""

    def __init__(self, log: MetricsLog, config: SodConfig, timeline: StepTimeline) -> None:
        self._log = log
        self._config = config
        self._metrics: dict[str, Any] = {}
        self._num_trajectories = 0
        self._timeline = timeline
        self._timeline.begin()
        self._rollout_bar: Progress | None = None

    @classmethod
    def open(cls, config: SodConfig, first_step: int, timeline: StepTimeline) -> Reporter:
        """Open the metrics file; a resumed run keeps the lines up to ``first_step``."""
        log = MetricsLog(
            Path(config.run.directory),
            config.report,
            dataclasses.asdict(config),
            first_step=first_step + 1 if first_step > 0 else 0,
        )
        return cls(log, config, timeline)

    def note(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the current line."""
        self._metrics.update(metrics)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Add an evaluation's metrics to the current line, and print the accuracies."""
        self.note(metrics)
        accuracies = [
            f"{name.split('/')[1].replace('_', ' ')}: {value:.1%}"
            for name, value in metrics.items()
            if name.endswith("/accuracy")
        ]
        self.say("evaluation: solved at " + ", ".join(accuracies))

    def step(
        self,
        step: int,
        batch: RecordedBatch,
        signals: BatchSignals,
        updates: Sequence[UpdateResult],
    ) -> None:
        """Add the training metrics of a step and its table of sampled trajectories."""
        self._num_trajectories = len(batch.trajectories)
        self.note(summarise_rollout(batch, with_teacher=self._config.needs_teacher))
        if self._config.needs_teacher:
            self.note(_signal_metrics(signals))
            self.note(metrics_by_outcome(_steps(batch, signals)))
        self.note(_update_metrics(updates))
        rows = [
            describe_trajectory(
                step + 1,
                batch.trajectories[i],
                signals.trajectories[i].step_divergence,
                signals.trajectories[i].step_weights,
            )
            for i in pick_evenly(len(batch.trajectories), self._config.report.trajectory_rows)
        ]
        self._log.log_trajectories(rows)
        self.say(format_rows(rows))

    def end_line(self, step: int) -> None:
        """Write the current line as that of the weights after ``step`` steps."""
        self.note(self._timeline.end_step(step, self._num_trajectories))
        self._log.log(step, self._metrics)
        self._print_summary(step)
        self._metrics, self._num_trajectories = {}, 0

    def end(self, completed_steps: int, steps: int, stop_reason: str | None) -> None:
        """Say how the run ended."""
        if completed_steps >= steps:
            self.say(f"finished {completed_steps} steps")
        else:
            self.say(
                f"stopped after {completed_steps} of {steps} steps because of {stop_reason}; "
                "the same command continues from there"
            )

    def say(self, text: str) -> None:
        """Print to standard error, where progress goes as well."""
        print(text, file=sys.stderr, flush=True)

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Book the seconds spent inside under ``time/<phase>``, and show them in the timeline."""
        return self._timeline.phase(phase)

    def progress(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        """Iterate over ``items`` with a progress bar."""
        with Progress(label, len(items)) as bar:
            for item in items:
                yield item
                bar.advance()

    def rollout_progress(self, progress: RolloutProgress) -> None:
        """Show how far a rollout is."""
        if self._rollout_bar is None:
            self._rollout_bar = Progress("rollout and scoring", progress.total)
        done = progress.finished + progress.dropped
        self._rollout_bar.advance_to(done, dropped=progress.dropped)
        if done == progress.total:
            self._rollout_bar.close()
            self._rollout_bar = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._log.close()

    def _print_summary(self, step: int) -> None:
        parts = [
            f"{label} {self._metrics[name]:{form}}"
            for name, label, form in _SUMMARY
            if name in self._metrics
        ]
        self.say(f"step {step}/{self._config.run.steps}: " + ", ".join(parts))


_SUMMARY = (
    ("reward/solved", "solved", ".1%"),
    ("rollout/failed_call_share", "failed calls", ".1%"),
    ("distillation/reverse_kl", "reverse KL", ".4f"),
    ("distillation/mean_d_k", "d_k", ".4f"),
    ("distillation/mean_w_k", "w_k", ".3f"),
    ("update/loss", "loss", ".4f"),
    ("update/grad_norm", "grad norm", ".3f"),
    ("time/step", "seconds", ".1f"),
)


def _signal_metrics(signals: BatchSignals) -> dict[str, float]:
    return {
        "distillation/reverse_kl": signals.reverse_kl,
        "distillation/mean_d_k": signals.mean_step_divergence,
        "distillation/mean_w_k": signals.mean_step_weight,
        "distillation/floored_logprobs": float(signals.num_floored),
        **_by_turn(signals),
    }


def _steps(batch: RecordedBatch, signals: BatchSignals) -> Iterator[StepValues]:
    for trajectory, signal in zip(batch.trajectories, signals.trajectories, strict=True):
        yield trajectory.tool_succeeded, signal.step_divergence, signal.step_weights


def _by_turn(signals: BatchSignals, turns: int = 4) -> dict[str, float]:
    """Mean ``d_k`` and ``w_k`` of the first turns, one series each."""
    metrics = {}
    for k in range(turns):
        rows = [t for t in signals.trajectories if len(t.step_divergence) > k]
        if rows:
            metrics[f"distillation/d_{k + 1}"] = _mean([t.step_divergence[k] for t in rows])
            metrics[f"distillation/w_{k + 1}"] = _mean([t.step_weights[k] for t in rows])
    return metrics


def _update_metrics(updates: Sequence[UpdateResult]) -> dict[str, float]:
    """Means over the optimizer updates of a step."""
    done = [update for update in updates if not update.skipped]
    metrics = {"update/skipped": float(len(updates) - len(done))}
    if not done:
        return metrics
    for name in ("loss", "grad_norm", "entropy", "clip_fraction", "dual_clip_fraction"):
        metrics[f"update/{name}"] = _mean([getattr(update, name) for update in done])
    metrics["update/approx_kl"] = _mean([update.approx_kl for update in done])
    metrics["update/lr"] = done[-1].lr
    metrics["update/tokens"] = float(sum(update.num_tokens for update in done))
    for name in done[0].terms:
        metrics[f"update/term/{name}"] = _mean([update.terms[name] for update in done])
    return metrics


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
