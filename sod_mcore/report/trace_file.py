"""The timeline of a step as a file for people: Chrome's trace event format, which Perfetto opens.

The format is a JSON object with ``traceEvents``: "X" is a span, with its start ``ts`` and length
``dur`` in microseconds; "M" names a process or a thread. A thread is drawn as one row, in which
spans must follow each other or nest: Perfetto drops those that cross.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sod_mcore.files import write_text
from sod_mcore.timeline import Span, Spans

Event = dict[str, Any]

TRAINER, ROLLOUT = 1, 2
"""Process ids in the trace; they only tell the two groups of rows apart."""

_FIRST_THREAD = 10
"""Thread id of lane 0: to some viewers, thread 0 and one with its process's id are special."""


def trace_path(directory: Path, step: int) -> Path:
    """Where the trace of ``step`` lies in a run's folder."""
    return directory / "timeline" / f"step_{step:06d}.json"


def write_trace(path: Path, trainer: Spans, pool: Sequence[Spans], origin: float) -> None:
    """Write the trace of a step, atomically.

    Args:
        path: the file; its folder is made if missing.
        trainer: the step and its phases in lane 0, and what the engines do meanwhile in lane 1.
        pool: spans of the rollout pool, batch by batch, in its lanes.
        origin: seconds of the clock that become time 0; no span starts before.
    """
    pool_spans = [span for spans in pool for span in spans]
    with_engines = any(span.lane == 1 for span in trainer)
    events = [
        *_names(TRAINER, "trainer", {0: "rank 0"} | ({1: "engines"} if with_engines else {})),
        *_names(ROLLOUT, "rollout", {n: f"lane {n}" for n in sorted({s.lane for s in pool_spans})}),
        *_events(TRAINER, trainer, origin),
        *_events(ROLLOUT, pool_spans, origin),
    ]
    write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _names(process: int, name: str, threads: dict[int, str]) -> Iterator[Event]:
    """Events that name a process and its rows, and keep both in order."""
    yield _metadata("process_name", process, 0, name=name)
    yield _metadata("process_sort_index", process, 0, sort_index=process)
    for lane, thread_name in threads.items():
        yield _metadata("thread_name", process, lane, name=thread_name)
        yield _metadata("thread_sort_index", process, lane, sort_index=lane)


def _metadata(kind: str, process: int, lane: int, **arguments: Any) -> Event:
    thread = _FIRST_THREAD + lane
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": arguments}


def _events(process: int, spans: Iterable[Span], origin: float) -> Iterator[Event]:
    """A complete event for each span, in the order of starts, what holds others before them."""
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        # Both ends are rounded, not the length: what touches or nests still does so afterwards.
        start, end = _microseconds(span.start - origin), _microseconds(span.end - origin)
        event: Event = {
            "name": span.kind,
            "ph": "X",
            "ts": start,
            "dur": end - start,
            "pid": process,
            "tid": _FIRST_THREAD + span.lane,
        }
        yield event | ({"args": {"of": span.label}} if span.label else {})


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
