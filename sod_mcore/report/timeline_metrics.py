"""What the spans of a step say in numbers: how long each thing went on, what waited for what.

Spans overlap (a thousand conversations at once), so seconds are those of the clock on the wall: of
the union of the intervals, never a sum over trajectories.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sod_mcore.timeline import POOL_KINDS, Spans


@dataclass(frozen=True)
class Window:
    """The time of one step: ``start`` and ``end`` in seconds of the spans' clock."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


def covered_seconds(intervals: NDArray[np.float64], window: Window) -> float:
    """Seconds of ``window`` in which at least one interval ``[N, 2]`` (start, end) was open."""
    if not len(intervals):
        return 0.0
    clipped = np.clip(intervals, window.start, window.end)
    starts, ends = clipped[np.argsort(clipped[:, 0])].T
    # An interval adds what lies behind the furthest end of all that began before it.
    reached = np.concatenate([[-np.inf], np.maximum.accumulate(ends)[:-1]])
    return float(np.maximum(ends - np.maximum(starts, reached), 0.0).sum())


def pool_metrics(pool: Sequence[Spans], window: Window, num_trajectories: int) -> dict[str, float]:
    """What the rollout pool did within ``window``, as ``timeline/<name>``.

    A span counts where it lies, whichever batch brought it: its part within the window. So the
    numbers hold for batches that begin in one step and end in another. Evaluation counts as well,
    because it keeps the same engines and tools busy; only ``trajectories_per_second`` is about
    training alone.

    Not counted are spans of batches that have not arrived when the window ends. When they arrive,
    their parts in earlier windows are in no line but ``late_seconds``.

    Args:
        pool: the spans that arrived in the window, batch by batch.
        window: the step.
        num_trajectories: finished trajectories that the step trained on.

    Returns:
        ``generate_seconds``, ``tool_seconds``, ``reward_seconds``, ``scoring_seconds``: seconds in
        which at least one was under way. ``exposed_scoring_seconds``: those in which the teacher
        scored while nothing was generated and no tool ran. ``late_seconds``: seconds before the
        window in which the pool worked and which no earlier line knows of. ``rollout_idle_share``:
        share of the window in which the pool did none of the four. ``trajectories_per_second``.
    """
    before = Window(-np.inf, window.start)
    playing = _covered(pool, ("generate", "tool"), window)
    playing_or_scoring = _covered(pool, ("generate", "tool", "scoring"), window)
    metrics = {f"{kind}_seconds": _covered(pool, (kind,), window) for kind in POOL_KINDS}
    metrics |= {
        "exposed_scoring_seconds": max(0.0, playing_or_scoring - playing),
        "late_seconds": _covered(pool, POOL_KINDS, before),
        "rollout_idle_share": 1.0 - _share(_covered(pool, POOL_KINDS, window), window),
        "trajectories_per_second": _share(num_trajectories, window),
    }
    return {f"timeline/{name}": value for name, value in metrics.items()}


def phase_metrics(phases: Spans, window: Window) -> dict[str, float]:
    """Seconds of the step and of each phase of the trainer, and the share that it waited.

    Returns:
        ``time/step``, ``time/<phase>`` (the sum of its spans), and ``timeline/trainer_idle_share``:
        share of the step in which rank 0 only waited for the pool's trajectories, the phase
        "rollout".
    """
    metrics = {"time/step": window.seconds}
    for span in phases:
        name = f"time/{span.kind}"
        metrics[name] = metrics.get(name, 0.0) + span.end - span.start
    waited = covered_seconds(phases.intervals(("rollout",)), window)
    return metrics | {"timeline/trainer_idle_share": _share(waited, window)}


def _covered(pool: Sequence[Spans], kinds: Collection[str], window: Window) -> float:
    intervals = [np.empty((0, 2)), *(spans.intervals(kinds) for spans in pool)]
    return covered_seconds(np.concatenate(intervals), window)


def _share(amount: float, window: Window) -> float:
    """``amount`` for each second of the window; 0 for a window without any."""
    return amount / window.seconds if window.seconds > 0 else 0.0
