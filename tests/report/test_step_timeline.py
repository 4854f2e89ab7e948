"""Each span is counted in the step in which it lies, and traces are what the format asks for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sod_mcore.report.step_timeline import StepTimeline
from sod_mcore.report.trace_file import write_trace
from sod_mcore.timeline import Span, Spans


class Clock:
    """Stands still until it is told to go on; it does not begin at 0."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def trace(path: Path) -> list[dict[str, Any]]:
    """The events of a file, as any JSON reader sees them."""
    tree = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    events = tree["traceEvents"]
    assert isinstance(events, list)
    return events


def check_events(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """The rules of the trace event format; the spans of each row, in the order of the file."""
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    named: set[tuple[int, int]] = set()
    processes: set[int] = set()
    for event in events:
        assert event["ph"] in ("X", "M")
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        row = event["pid"], event["tid"]
        if event["ph"] == "X":
            assert all(isinstance(event[key], int | float) for key in ("ts", "dur"))
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            rows.setdefault(row, []).append(event)
        elif event["name"] == "thread_name":
            named.add(row)
            assert event["args"]["name"]
        elif event["name"] == "process_name":
            processes.add(event["pid"])
            assert event["args"]["name"]
    assert set(rows) <= named, "each row has a name"
    assert {process for process, _ in rows} <= processes
    return rows


def assert_nested(row: list[dict[str, Any]]) -> None:
    """Each span, in the order of the file, follows the open ones or lies within the last of them;
    a reader that keeps a stack needs no more."""
    stack: list[tuple[float, float]] = []
    for event in row:
        start, end = event["ts"], event["ts"] + event["dur"]
        while stack and stack[-1][1] <= start:
            stack.pop()
        assert not stack or (stack[-1][0] <= start and end <= stack[-1][1]), event
        stack.append((start, end))


def names(row: Iterable[dict[str, Any]]) -> list[str]:
    return [event["name"] for event in row]


def played(start: float, lane: int = 0) -> Spans:
    """Two turns and a tool call of a second each, then a scoring of two."""
    kinds = (("generate", 1), ("tool", 1), ("generate", 1), ("scoring", 2))
    spans, now = [], start
    for kind, seconds in kinds:
        spans.append(Span(kind, now, now + seconds, lane, "p0"))
        now += seconds
    return Spans.of(spans)


def test_a_step_as_metrics_and_as_a_trace(tmp_path: Path) -> None:
    clock = Clock()
    timeline = StepTimeline(tmp_path, trace_every=1, clock=clock)
    clock.now += 30  # the model is built
    timeline.begin()
    with timeline.phase("rollout"):
        clock.now += 6
        timeline.add(played(1030.5))
    with timeline.phase("updates"):
        clock.now += 3
    clock.now += 1
    metrics = timeline.end_step(12, 20)
    assert metrics == {
        "time/step": 10.0,
        "time/rollout": 6.0,
        "time/updates": 3.0,
        "timeline/trainer_idle_share": 0.6,
        "timeline/generate_seconds": 2.0,
        "timeline/tool_seconds": 1.0,
        "timeline/reward_seconds": 0.0,
        "timeline/scoring_seconds": 2.0,
        "timeline/exposed_scoring_seconds": 2.0,
        "timeline/late_seconds": 0.0,
        "timeline/rollout_idle_share": 0.5,
        "timeline/trajectories_per_second": 2.0,
    }
    events = trace(tmp_path / "timeline" / "step_000012.json")
    rows = check_events(events)
    trainer, lane = rows.values()
    assert names(trainer) == ["step 12", "rollout", "updates"]
    assert [event["ts"] for event in trainer] == [30_000_000, 30_000_000, 36_000_000]
    assert [event["dur"] for event in trainer] == [10_000_000, 6_000_000, 3_000_000]
    assert names(lane) == ["generate", "tool", "generate", "scoring"]
    assert lane[0]["ts"] == 30_500_000
    assert lane[0]["args"] == {"of": "p0"}
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        "trainer",
        "rollout",
    }


def test_work_that_lies_in_two_steps_is_cut_between_them(tmp_path: Path) -> None:
    """A batch is played from 3 s before the end of a step to 2 s behind it, and arrives there."""
    clock = Clock()
    timeline = StepTimeline(tmp_path, trace_every=1, clock=clock)
    clock.now += 10
    first = timeline.end_step(1, 8)
    assert first["timeline/generate_seconds"] == 0.0, "it has not arrived"
    timeline.add(played(1007))
    clock.now += 10
    second = timeline.end_step(2, 8)
    assert second["timeline/generate_seconds"] == 0.0
    assert second["timeline/scoring_seconds"] == 2.0
    assert second["timeline/late_seconds"] == 3.0
    assert second["timeline/rollout_idle_share"] == pytest.approx(0.8)
    pool = [
        event
        for event in trace(tmp_path / "timeline" / "step_000002.json")
        if event["ph"] == "X" and event["pid"] == 2
    ]
    assert names(pool) == ["generate", "tool", "generate", "scoring"]
    assert pool[0]["ts"] == 7_000_000
    clock.now += 10
    assert timeline.end_step(3, 8)["timeline/late_seconds"] == 0.0, "spans count once"


def test_phases_may_nest_and_belong_to_one_step(tmp_path: Path) -> None:
    clock = Clock()
    timeline = StepTimeline(tmp_path, trace_every=1, clock=clock)
    for step in (1, 2):
        with timeline.phase("updates"):
            clock.now += 1 / 3
            with timeline.phase("checkpoint"):
                clock.now += 1 / 7
        timeline.end_step(step, 0)
    rows = check_events(trace(tmp_path / "timeline" / "step_000002.json"))
    (trainer,) = rows.values()
    assert_nested(trainer)
    # Step 2 began with writing the trace of step 1.
    assert sorted(names(trainer)) == ["checkpoint", "step 2", "trace", "updates"]


def test_sleeping_engines_have_a_row_of_their_own(tmp_path: Path) -> None:
    """Their sleep ends within a phase of rank 0, which one row could not show."""
    clock = Clock()
    timeline = StepTimeline(tmp_path, trace_every=1, clock=clock)
    with timeline.phase("updates"):
        clock.now += 4
    with timeline.phase("weight_sync"):
        clock.now += 1
        timeline.note(Span("engines_asleep", 1000.0, 1005.0, lane=1))
        clock.now += 2
        timeline.note(Span("engine_wake", 1005.0, 1006.0))
    metrics = timeline.end_step(1, 0)
    assert metrics["time/engines_asleep"] == 5.0
    assert metrics["time/engine_wake"] == 1.0
    events = trace(tmp_path / "timeline" / "step_000001.json")
    for row in check_events(events).values():
        assert_nested(row)
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == [
        "rank 0",
        "engines",
    ]


@pytest.mark.parametrize(("every", "written"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_traces_are_written_every_so_many_steps(
    tmp_path: Path, every: int, written: list[int]
) -> None:
    timeline = StepTimeline(tmp_path, trace_every=every)
    for step in range(1, 7):
        timeline.end_step(step, 0)
    paths = sorted(path.name for path in tmp_path.rglob("*"))
    folder = ["timeline"] if written else []
    assert paths == [*(f"step_{step:06d}.json" for step in written), *folder]


@given(st.lists(st.lists(st.floats(1000.0, 1001.0), min_size=2), max_size=4))
def test_what_touches_or_nests_still_does_so_in_microseconds(lanes: list[list[float]]) -> None:
    """Each lane is cut at any moments, its pieces are cut again, and all lie within one span."""
    spans = []
    for lane, cuts in enumerate(lanes):
        moments = sorted(cuts)
        spans.append(Span("whole", moments[0], moments[-1], lane))
        for start, end in itertools.pairwise(moments):
            middle = (start + end) / 2
            spans += [Span("piece", start, end, lane), Span("half", start, middle, lane)]
    path = Path("trace.json")
    with pytest.MonkeyPatch.context() as patch:
        texts: list[str] = []
        patch.setattr(
            "sod_mcore.report.trace_file.write_text", lambda path, text: texts.append(text)
        )
        write_trace(path, Spans.of(), [Spans.of(spans)], 1000.0)
    rows = check_events(json.loads(texts[0])["traceEvents"])
    assert sum(len(row) for row in rows.values()) == len(spans)
    for row in rows.values():
        assert_nested(row)
