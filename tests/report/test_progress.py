"""Progress: a bar where somebody looks, few plain lines where a file collects them."""

from __future__ import annotations

import io
import os
import pty
import select

from sod_mcore.report.progress import Progress


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_file_gets_the_first_the_last_and_few_lines_between() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(
        "rollout", 40, unit="trajectories", stream=stream, seconds_between_lines=10, clock=clock
    )
    with progress:
        for _ in range(40):
            clock.now += 1
            progress.advance()
    assert stream.getvalue().splitlines() == [
        "rollout: 1/40 trajectories in 1 s",
        "rollout: 11/40 trajectories in 11 s",
        "rollout: 21/40 trajectories in 21 s",
        "rollout: 31/40 trajectories in 31 s",
        "rollout: 40/40 trajectories in 40 s",
    ]


def test_facts_stand_beside_the_count() -> None:
    stream = io.StringIO()
    with Progress("training", 3, stream=stream, clock=Clock()) as progress:
        progress.advance_to(2, loss=0.123456, dropped=1)
    assert stream.getvalue() == "training: 2/3 it in 0 s (loss 0.1235, dropped 1)\n"


def test_work_that_never_advanced_still_says_so() -> None:
    stream = io.StringIO()
    with Progress("scoring", 5, stream=stream, clock=Clock()):
        pass
    assert stream.getvalue() == "scoring: 0/5 it in 0 s\n"


def test_a_failure_shows_how_far_it_came() -> None:
    stream = io.StringIO()
    try:
        with Progress("rollout", 5, stream=stream, clock=Clock()) as progress:
            progress.advance(1)
            progress.advance(2)
            raise KeyError("engine")
    except KeyError:
        assert stream.getvalue().splitlines()[-1] == "rollout: 3/5 it in 0 s"


def test_a_terminal_gets_a_bar() -> None:
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        with Progress("rollout", 4, stream=terminal) as progress:
            progress.advance(4, dropped=0)
        shown = _read_until(reader, "4/4")
    os.close(reader)
    assert "rollout: 100%|" in shown
    assert "dropped 0" in shown


def _read_until(reader: int, text: str) -> str:
    """What a terminal received up to the first line end after ``text``; it comes in pieces."""
    shown = ""
    while text not in shown or not shown.endswith("\n"):
        ready, _, _ = select.select([reader], [], [], 10)
        assert ready, f"{text!r} did not come; so far: {shown!r}"
        shown += os.read(reader, 65536).decode(errors="replace")
    return shown
