"""Lanes are used again, so that there are no more than were held at once."""

import itertools
from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st

from sod_mcore.rollout.lanes import Lanes, Track, open_track
from sod_mcore.timeline import Span, SpanRecorder


@given(st.lists(st.integers(-8, 8)))
def test_the_lowest_free_lane_is_given(changes: list[int]) -> None:
    """A positive number takes a lane; another one gives back one of those held, if any is."""
    lanes = Lanes()
    held: dict[int, ExitStack] = {}
    for change in changes:
        if change > 0:
            stack = ExitStack()
            lane = stack.enter_context(lanes.hold())
            assert lane == next(n for n in itertools.count() if n not in held)
            held[lane] = stack
        elif held:
            held.pop(list(held)[change % len(held)]).close()


def test_spans_of_a_track_are_in_its_lane_and_others_beside_it() -> None:
    recorder, lanes = SpanRecorder(clock=itertools.count().__next__), Lanes()
    with lanes.hold(), open_track(recorder, lanes, "p7") as track, track.span("scoring"):
        with track.span_beside("reward"):
            pass
        with track.span("tool", "calculator"):
            pass
    assert list(recorder.take()) == [
        Span("reward", 1, 2, 2, "p7"),
        Span("tool", 3, 4, 1, "calculator"),
        Span("scoring", 0, 5, 1, "p7"),
    ]


def test_a_lane_is_free_again_after_an_error() -> None:
    recorder, lanes = SpanRecorder(), Lanes()

    def fail() -> Track:
        with open_track(recorder, lanes, "p0"):
            raise RuntimeError

    for _ in range(3):
        try:
            fail()
        except RuntimeError:
            with lanes.hold() as lane:
                assert lane == 0
