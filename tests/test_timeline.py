"""Spans are noted however they end, keep their content on their way, and share one clock."""

import asyncio
import itertools
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sod_mcore.timeline import Span, SpanRecorder, Spans

TEXTS = st.sampled_from(["generate", "tool", "scoring", "", "prompt 1", "prompt 2"])
SPANS = st.builds(
    lambda kind, start, length, lane, label: Span(kind, start, start + length, lane, label),
    *(TEXTS, st.floats(0, 1e6), st.floats(0, 100), st.integers(0, 2000), TEXTS),
)


@given(st.lists(SPANS))
def test_columns_hold_what_the_spans_held(spans: list[Span]) -> None:
    arrived = pickle.loads(pickle.dumps(Spans.of(spans)))
    assert list(arrived) == spans
    assert len(arrived) == len(spans)


@given(st.lists(SPANS), st.sets(TEXTS))
def test_intervals_are_those_of_the_kinds(spans: list[Span], kinds: set[str]) -> None:
    expected = [[span.start, span.end] for span in spans if span.kind in kinds]
    np.testing.assert_array_equal(
        Spans.of(spans).intervals(kinds), np.array(expected, np.float64).reshape(-1, 2)
    )


def test_open_spans_are_noted_when_they_end() -> None:
    recorder = SpanRecorder(clock=itertools.count().__next__)
    with recorder.span("updates"):
        with recorder.span("checkpoint", lane=1, label="a"):
            assert len(recorder.take()) == 0
        assert list(recorder.take()) == [Span("checkpoint", 1, 2, 1, "a")]
    assert list(recorder.take()) == [Span("updates", 0, 3)]
    assert len(recorder.take()) == 0


def test_an_error_ends_a_span_and_passes() -> None:
    recorder = SpanRecorder()
    with pytest.raises(ValueError, match="broken"), recorder.span("tool"):
        raise ValueError("broken")
    assert [span.kind for span in recorder.take()] == ["tool"]


def test_a_cancellation_ends_a_span_and_passes() -> None:
    recorder = SpanRecorder()

    async def work() -> None:
        with recorder.span("generate"):
            await asyncio.sleep(60)

    async def cancel() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    (span,) = recorder.take()
    assert 0.04 < span.end - span.start < 30


def test_the_clock_is_that_of_other_processes() -> None:
    program = """if True:
        from sod_mcore.timeline import SpanRecorder
        recorder = SpanRecorder()
        with recorder.span("tool"):
            pass
        (span,) = recorder.take()
        print(span.start, span.end)
    """
    before = time.monotonic()
    printed = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60)
    start, end = map(float, printed.split())
    assert before < start <= end < time.monotonic()
