"""The timeline of a run on global rank 0: its own phases, and what the rollout pool sends.

When a step is over, its spans become metrics and, every ``report.trace_every`` steps, a file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sod_mcore.report.timeline_metrics import Window, phase_metrics, pool_metrics
from sod_mcore.report.trace_file import trace_path, write_trace
from sod_mcore.timeline import Clock, Span, SpanRecorder, Spans


class StepTimeline:
    """Gathers spans and hands them out step by step; made before the pool, whose spans it takes."""

    def __init__(
        self, directory: Path, *, trace_every: int = 0, clock: Clock = time.monotonic
    ) -> None:
        """Begin the first step.

        Args:
            directory: the run's folder.
            trace_every: steps between traces; 0 writes none.
            clock: that of the pool's spans.
        """
        self._directory = directory
        self._trace_every = trace_every
        self._clock = clock
        self._phases = SpanRecorder(clock)
        self._arrived: list[Spans] = []
        self._origin = self._step_started = clock()

    def begin(self) -> None:
        """Let the first step begin now, and not when this was made."""
        self._step_started = self._clock()

    def add(self, spans: Spans) -> None:
        """Take the spans of a batch of the pool, of training or evaluation."""
        self._arrived.append(spans)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Hold this around a phase of the step; phases may nest."""
        with self._phases.span(name):
            yield

    def note(self, span: Span) -> None:
        """Take a phase that was timed elsewhere; in lane 1, one of the engines."""
        self._phases.add(span)

    def end_step(self, step: int, num_trajectories: int) -> dict[str, float]:
        """The metrics of the step that ends now (``time/...``, ``timeline/...``); the next begins.

        The trace, where one is due, holds all spans that arrived since the step before, also those
        that began earlier. Writing it is a phase, "trace", of the step that comes next.

        Args:
            step: number of the metrics' line.
            num_trajectories: finished trajectories that the step trained on.
        """
        window = Window(self._step_started, self._clock())
        phases, pool = self._phases.take(), tuple(self._arrived)
        self._step_started, self._arrived = window.end, []
        if self._trace_every > 0 and step % self._trace_every == 0:
            with self.phase("trace"):
                self._write(step, window, phases, pool)
        return phase_metrics(phases, window) | pool_metrics(pool, window, num_trajectories)

    def _write(self, step: int, window: Window, phases: Spans, pool: tuple[Spans, ...]) -> None:
        whole = Span(f"step {step}", window.start, window.end)
        path = trace_path(self._directory, step)
        write_trace(path, Spans.of([whole, *phases]), pool, self._origin)
