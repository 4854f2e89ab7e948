"""Scoring requests that are sent to a second engine, and the engine that loses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.client.scoring import Scores, score
from tests.serving.scripted_generation import (
    PATIENCE,
    ScriptedEngine,
    answers,
    ask,
    connect,
    generated,
    never,
    run_bounded,
    scored,
    until,
)


async def scores_of(client: EngineClient) -> Scores:
    return await score(client, "student", [1, 2, 3], 1)


def scoring(body: dict[str, Any]) -> web.Response:
    return web.json_response(scored(body))


async def quick(body: dict[str, Any]) -> web.Response:
    return scoring(body)


def test_a_slow_scoring_request_goes_to_a_second_engine() -> None:
    """The answer that comes first counts; the other engine is told to abort."""

    async def test() -> None:
        engines = [ScriptedEngine(never), ScriptedEngine(quick)]
        async with connect(*engines, hedge_after_seconds=0.05) as client:
            assert (await scores_of(client)).logprobs[1:].tolist() == [-1, -1]
            loser = engines[0].requests[0]["rid"]
            await until(lambda: engines[0].aborted == [loser])
            assert engines[1].requests[0]["rid"] != loser
            assert not engines[1].aborted
            counters = client.counters("student")
            assert (counters.hedged, counters.retries, counters.timeouts) == (1, 0, 0)
            replicas = client._replicas["student"].all
            assert all(replica.is_up for replica in replicas), "to be slow is no failure"
            assert [replica.outstanding_tokens for replica in replicas] == [0, 0]

    run_bounded(test)


def test_a_quick_scoring_request_is_not_hedged() -> None:
    async def test() -> None:
        engines = [ScriptedEngine(quick), ScriptedEngine(quick)]
        async with connect(*engines, hedge_after_seconds=PATIENCE) as client:
            await scores_of(client)
            assert client.counters("student").hedged == 0

    run_bounded(test)


def test_a_second_engine_that_fails_is_no_harm() -> None:
    async def test() -> None:
        proceed = asyncio.Event()

        async def slow(body: dict[str, Any]) -> web.Response:
            await proceed.wait()
            return scoring(body)

        engines = [ScriptedEngine(slow), ScriptedEngine(answers(500))]
        async with connect(*engines, hedge_after_seconds=0.05) as client:
            task = asyncio.create_task(scores_of(client))
            await until(lambda: client.counters("student").bad_answers == 1)
            proceed.set()
            await task
            assert client.counters("student").retries == 0

    run_bounded(test)


def test_both_engines_may_fail() -> None:
    async def test() -> None:
        async def slow(body: dict[str, Any]) -> web.Response:
            await asyncio.sleep(0.1)
            return web.Response(status=500)

        engines = [ScriptedEngine(slow), ScriptedEngine(slow)]
        async with connect(*engines, hedge_after_seconds=0.02, attempts=1) as client:
            with pytest.raises(EngineError, match="gave up after 1 tries"):
                await scores_of(client)

    run_bounded(test)


def test_sampling_is_never_hedged() -> None:
    async def test() -> None:
        async def slow(body: dict[str, Any]) -> web.Response:
            await asyncio.sleep(0.2)
            return web.json_response(generated([7, 8, 9]))

        engines = [ScriptedEngine(slow), ScriptedEngine(slow)]
        async with connect(*engines, hedge_after_seconds=0.01) as client:
            await ask(client)
            assert client.counters("student").hedged == 0
            assert not engines[1].requests

    run_bounded(test)


def test_a_cancelled_hedge_aborts_both() -> None:
    async def test() -> None:
        engines = [ScriptedEngine(never), ScriptedEngine(never)]
        async with connect(*engines, hedge_after_seconds=0.02) as client:
            task = asyncio.create_task(scores_of(client))
            await until(lambda: all(len(engine.requests) == 1 for engine in engines))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: all(len(engine.aborted) == 1 for engine in engines))

    run_bounded(test)


def test_a_hedge_ends_at_the_deadline_of_the_request() -> None:
    async def test() -> None:
        engines = [ScriptedEngine(never), ScriptedEngine(never)]
        settings = {"hedge_after_seconds": 0.05, "request_timeout_seconds": 3.0}
        async with connect(*engines, **settings) as client:
            with pytest.raises(EngineError, match="no answer within 3 s"):
                await scores_of(client)
            assert client.counters("student").hedged == 1
            await until(lambda: all(len(engine.aborted) == 1 for engine in engines))

    run_bounded(test)
