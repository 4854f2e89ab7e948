"""In which row of the timeline a trajectory's spans are drawn.

A viewer draws a row for each lane and allows no two spans to cross in one. A lane for each
trajectory would be thousands of rows that are nearly empty, so lanes are used again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from sod_mcore.timeline import PoolKind, SpanRecorder


class Lanes:
    """Gives out the lowest lane that is free: there are as many as were ever held at once.

    All batches of a pool share one object, so that batches under way at the same time do not meet
    in a lane.
    """

    def __init__(self) -> None:
        self._free: list[int] = []
        self._count = 0

    @contextmanager
    def hold(self) -> Iterator[int]:
        """A lane of one's own for as long as this is held."""
        lane = heapq.heappop(self._free) if self._free else self._new()
        try:
            yield lane
        finally:
            heapq.heappush(self._free, lane)

    def _new(self) -> int:
        self._count += 1
        return self._count - 1


@dataclass(frozen=True)
class Track:
    """Records what is done for one attempt at a trajectory.

    Attributes:
        recorder: takes the spans.
        lanes: where lanes come from.
        lane: that of the trajectory, from its slot until it is scored.
        label: the prompt's id.
    """

    recorder: SpanRecorder
    lanes: Lanes
    lane: int
    label: str

    def span(self, kind: PoolKind, label: str | None = None) -> AbstractContextManager[None]:
        """A span in the trajectory's lane, under its own label unless another is given."""
        return self.recorder.span(kind, self.lane, self.label if label is None else label)

    @contextmanager
    def span_beside(self, kind: PoolKind) -> Iterator[None]:
        """A span that may cross others of the trajectory, and so has a lane of its own."""
        with self.lanes.hold() as lane, self.recorder.span(kind, lane, self.label):
            yield


@contextmanager
def open_track(recorder: SpanRecorder, lanes: Lanes, label: str) -> Iterator[Track]:
    """Hold a lane for one attempt at a trajectory."""
    with lanes.hold() as lane:
        yield Track(recorder, lanes, lane, label)
