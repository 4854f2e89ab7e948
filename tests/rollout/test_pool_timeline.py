"""The real pool process against a scripted engine: its spans arrive, and lie where they should."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import dataclass

import pytest

from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.process_pool import ProcessPool
from sod_mcore.rollout.request import RolloutRequest, RolloutResult
from sod_mcore.timeline import Span, Spans
from sod_mcore.trajectory import Prompt
from tests.rollout.scripted_engine import (
    QUESTION,
    SCORING_SECONDS,
    ScriptedEngine,
    serve,
    settings,
)

CLOSED_SECONDS = 0.5


@dataclass(frozen=True)
class Played:
    """A batch, and what was seen of it from outside.

    Attributes:
        result: three trajectories, begun while the gate was closed.
        heard: what the pool's handle told of.
        submitted: seconds of our clock, as are the others.
        opened: when the gate was.
        collected: when the result was here.
        served: start and end of each request for a turn in the engine, in order.
    """

    result: RolloutResult
    heard: tuple[Spans, ...]
    submitted: float
    opened: float
    collected: float
    served: tuple[tuple[float, float], ...]

    @property
    def spans(self) -> list[Span]:
        """All that were heard of."""
        return [span for spans in self.heard for span in spans]

    def of_kind(self, kind: str) -> list[Span]:
        """Its spans of a kind, in the order in which they began."""
        spans = (span for span in self.spans if span.kind == kind)
        return sorted(spans, key=lambda span: span.start)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    engine, heard = ScriptedEngine(), list[Spans]()
    request = RolloutRequest((Prompt((QUESTION,), "5", "sums", "p0"),), 3, Sampling(1.0, 1.0))
    with (
        serve(engine) as url,
        ProcessPool(settings(tmp_path_factory.mktemp("run"), url), heard.append) as pool,
    ):
        pool.pause()
        submitted = time.monotonic()
        ticket = pool.submit(request)
        time.sleep(CLOSED_SECONDS)
        opened = time.monotonic()
        pool.resume()
        result = pool.collect(ticket, 60.0)
        collected = time.monotonic()
    return Played(result, tuple(heard), submitted, opened, collected, tuple(engine.served))


def test_every_part_of_every_trajectory_is_there(played: Played) -> None:
    assert [t.is_correct and t.is_scored for t in played.result.trajectories] == [True] * 3
    assert Counter((span.kind, span.label) for span in played.spans) == {
        ("generate", "p0"): 6,
        ("tool", "calculator"): 3,
        ("reward", "p0"): 3,
        ("scoring", "p0"): 3,
    }
    assert list(played.heard[-1]) == list(played.result.spans)


def test_its_clock_is_ours(played: Played) -> None:
    for span in played.spans:
        assert played.submitted < span.start <= span.end < played.collected


def test_a_turn_lasts_from_sending_to_its_answer(played: Played) -> None:
    """Neither the closed gate nor the wait for the only connection is in it."""
    turns = played.of_kind("generate")
    assert turns[0].start > played.opened
    for turn, (start, end) in zip(turns, played.served, strict=True):
        assert turn.start <= start < end <= turn.end
    for earlier, later in itertools.pairwise(turns):
        assert earlier.end <= later.start


def test_the_teacher_is_timed_in_the_same_way(played: Played) -> None:
    scores = played.of_kind("scoring")
    for earlier, later in itertools.pairwise(scores):
        assert earlier.end <= later.start
    assert all(span.end - span.start > 0.99 * SCORING_SECONDS for span in scores)
