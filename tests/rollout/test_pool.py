"""The real pool process against a scripted engine: several batches, a busy trainer, versions."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.pool import RolloutError, RolloutInterruptedError
from sod_mcore.rollout.process_pool import ProcessPool
from sod_mcore.rollout.request import RolloutRequest
from sod_mcore.trajectory import Prompt
from tests.rollout.scripted_engine import QUESTION, ScriptedEngine, serve, settings

PROMPT = Prompt((QUESTION,), "5", "sums", "p0")
CONNECTIONS = 64


def asked(
    samples: int, weight_version: int | None = None, prompt: Prompt = PROMPT
) -> RolloutRequest:
    return RolloutRequest(
        *((prompt,), samples, Sampling(1.0, 1.0)),
        with_teacher=False,
        weight_version=weight_version,
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_pool_goes_on_while_nobody_listens(tmp_path: Path) -> None:
    """A busy trainer reads nothing: three batches of results are more than the pipe holds."""
    engine = ScriptedEngine(turn_seconds=0.0)
    with (
        serve(engine) as url,
        ProcessPool(settings(tmp_path, url, CONNECTIONS)) as pool,
    ):
        tickets = [pool.submit(asked(200)) for _ in range(3)]
        until(lambda: len(engine.served) == 3 * 200 * 2)
        for ticket in reversed(tickets):
            assert len(pool.collect(ticket, 60.0).trajectories) == 200


def test_a_batch_that_is_cancelled_ends_in_the_engine(tmp_path: Path) -> None:
    engine = ScriptedEngine(turn_seconds=600.0)
    with (
        serve(engine) as url,
        ProcessPool(settings(tmp_path, url, CONNECTIONS)) as pool,
    ):
        ticket = pool.submit(asked(5))
        with pytest.raises(RolloutInterruptedError):
            pool.collect(ticket, 60.0, should_stop=lambda: bool(engine.open_turns))
        until(lambda: engine.open_turns == 5)
        pool.cancel(ticket)
        until(lambda: len(engine.aborted) == 5)
        engine.turn_seconds = 0.0
        assert len(pool.collect(pool.submit(asked(2)), 60.0).trajectories) == 2


def test_an_unusable_row_ends_its_own_batch_only(tmp_path: Path) -> None:
    """One that was sampled ahead takes nothing from the steps before it."""
    engine = ScriptedEngine(turn_seconds=0.0)
    without_answer = Prompt((QUESTION,), "", "sums", "p1")
    with (
        serve(engine) as url,
        ProcessPool(settings(tmp_path, url, CONNECTIONS)) as pool,
    ):
        bad = pool.submit(asked(3, prompt=without_answer))
        good = pool.submit(asked(3))
        assert len(pool.collect(good, 60.0).trajectories) == 3
        with pytest.raises(RolloutError, match=r"^rollout pool: UnusableRowError: p1: .*ground"):
            pool.collect(bad, 60.0)
        assert len(pool.collect(pool.submit(asked(2)), 60.0).trajectories) == 2


def test_an_engine_samples_nothing_before_it_has_the_weights(tmp_path: Path) -> None:
    engine = ScriptedEngine(turn_seconds=0.0)
    engine.version = 3
    with (
        serve(engine) as url,
        ProcessPool(settings(tmp_path, url, CONNECTIONS)) as pool,
    ):
        assert pool.collect(pool.submit(asked(2, weight_version=3)), 60.0).trajectories
        ticket, served = pool.submit(asked(2, weight_version=4)), len(engine.served)
        asking = time.monotonic() + 2.0
        with pytest.raises(RolloutInterruptedError):
            pool.collect(ticket, 60.0, should_stop=lambda: time.monotonic() > asking)
        assert len(engine.served) == served, "it still has the weights of before"
        engine.version = 4
        batch = pool.collect(ticket, 60.0)
    assert {int(v) for t in batch.trajectories for v in t.weight_version[t.loss_mask]} == {4}
