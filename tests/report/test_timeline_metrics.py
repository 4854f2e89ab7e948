"""Seconds and shares against a count, tick by tick, of what was open."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sod_mcore.report.timeline_metrics import Window, covered_seconds, phase_metrics, pool_metrics
from sod_mcore.timeline import POOL_KINDS, Span, Spans

TICKS = 40
"""Spans begin and end on whole ticks; tick t is the second from t to t + 1."""


@st.composite
def spans(draw: st.DrawFn, kinds: tuple[str, ...] = POOL_KINDS) -> Span:
    start = draw(st.integers(0, TICKS))
    return Span(draw(st.sampled_from(kinds)), start, draw(st.integers(start, TICKS)))


@st.composite
def windows(draw: st.DrawFn) -> Window:
    start = draw(st.integers(0, TICKS - 1))
    return Window(start, draw(st.integers(start + 1, TICKS)))


def is_open(found: list[Span], tick: int, *kinds: str) -> bool:
    return any(span.kind in kinds and span.start <= tick < span.end for span in found)


def ticks(window: Window) -> range:
    return range(int(window.start), int(window.end))


@given(st.lists(spans(), max_size=12), windows())
def test_covered_seconds_are_the_ticks_in_which_something_is_open(
    found: list[Span], window: Window
) -> None:
    counted = sum(is_open(found, tick, *POOL_KINDS) for tick in ticks(window))
    intervals = Spans.of(found).intervals(POOL_KINDS)
    assert covered_seconds(intervals, window) == pytest.approx(counted, abs=1e-9)


@given(st.lists(st.lists(spans(), max_size=8), max_size=3), windows())
def test_pool_metrics_are_the_ticks_of_their_definitions(
    batches: list[list[Span]], window: Window
) -> None:
    """Batches are cut at the window, and lie in it, before it and behind it."""
    metrics = pool_metrics([Spans.of(batch) for batch in batches], window, 6)
    found = [span for batch in batches for span in batch]
    for kind in POOL_KINDS:
        seconds = sum(is_open(found, tick, kind) for tick in ticks(window))
        assert metrics[f"timeline/{kind}_seconds"] == pytest.approx(seconds, abs=1e-9)
    exposed = sum(
        is_open(found, tick, "scoring") and not is_open(found, tick, "generate", "tool")
        for tick in ticks(window)
    )
    assert metrics["timeline/exposed_scoring_seconds"] == pytest.approx(exposed, abs=1e-9)
    idle = sum(not is_open(found, tick, *POOL_KINDS) for tick in ticks(window))
    seconds = len(ticks(window))
    assert metrics["timeline/rollout_idle_share"] == pytest.approx(idle / seconds, abs=1e-9)
    late = sum(is_open(found, tick, *POOL_KINDS) for tick in range(int(window.start)))
    assert metrics["timeline/late_seconds"] == pytest.approx(late, abs=1e-9)
    assert metrics["timeline/trajectories_per_second"] == pytest.approx(6 / seconds)


@given(st.lists(spans(), min_size=1, max_size=8), st.integers(1, TICKS - 1))
def test_two_windows_side_by_side_share_out_what_one_has(found: list[Span], cut: int) -> None:
    intervals = Spans.of(found).intervals(POOL_KINDS)
    parts = [covered_seconds(intervals, Window(*ends)) for ends in ((0, cut), (cut, TICKS))]
    assert sum(parts) == pytest.approx(covered_seconds(intervals, Window(0, TICKS)), abs=1e-9)


def test_thousands_of_spans_at_fractions_of_a_second() -> None:
    """Against a grid of milliseconds, in whose middles nothing begins or ends."""
    random = np.random.default_rng(0)
    starts = random.integers(0, 9000, 3000)
    ends = starts + random.integers(0, 12, 3000)
    grid = np.zeros(10_000, bool)
    for start, end in zip(starts, ends, strict=True):
        grid[start:end] = True
    seconds = covered_seconds(np.stack([starts, ends], axis=1) / 1000, Window(1.5, 8.25))
    assert 0.2 * 6.75 < seconds < 0.99 * 6.75
    assert seconds == pytest.approx(grid[1500:8250].sum() / 1000, abs=1e-6)


def test_phases_become_times_and_the_share_of_waiting() -> None:
    phases = [
        Span("rollout", 100.0, 103.0),
        Span("updates", 103.0, 107.0),
        Span("weight_sync", 107.0, 107.5),
        Span("weight_sync", 108.0, 108.25),
    ]
    metrics = phase_metrics(Spans.of(phases), Window(100.0, 110.0))
    assert metrics == {
        "time/step": 10.0,
        "time/rollout": 3.0,
        "time/updates": 4.0,
        "time/weight_sync": 0.75,
        "timeline/trainer_idle_share": pytest.approx(0.3),
    }


def test_a_step_without_a_pool() -> None:
    metrics = pool_metrics([], Window(5.0, 7.0), 0)
    assert metrics.pop("timeline/rollout_idle_share") == 1.0
    assert set(metrics.values()) == {0.0}
