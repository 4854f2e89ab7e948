"""Which weights may answer a request: only those of the version that is required, or later ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.client.scoring import score
from tests.serving.scripted_generation import (
    PATIENCE,
    ScriptedEngine,
    answers,
    ask,
    connect,
    run_bounded,
    scored,
    serving,
    until,
)


def test_only_engines_with_the_required_weights_are_used() -> None:
    async def test() -> None:
        old, new = ScriptedEngine(serving(0)), ScriptedEngine(serving(7))
        new.weight_version = "7"
        async with connect(old, new) as client:
            client.require_version("student", 7)
            for n in range(5):
                assert (await ask(client, str(n))).weight_version == 7
            assert (len(old.requests), len(new.requests)) == (0, 5)
            assert "health" not in old.checks + new.checks, "none of them has failed"
            old.handler, old.weight_version = serving(8), "8"
            await until(lambda: client._replicas["student"].all[0].is_up)
            await ask(client)
            assert len(old.requests) == 1
            assert client.counters("student").stale_answers == 0

    run_bounded(test)


def test_requests_that_wait_for_new_weights_are_shared() -> None:
    """The first engine that reports the version does not get them all."""

    async def test() -> None:
        engines = [ScriptedEngine(serving(7)) for _ in range(3)]
        for engine in engines:
            engine.weight_version = "7"
        async with connect(*engines) as client:
            client.require_version("student", 7)
            await asyncio.gather(*(ask(client, str(n)) for n in range(12)))
        assert [len(engine.requests) for engine in engines] == [4, 4, 4]

    run_bounded(test)


def test_the_wait_for_weights_of_a_healthy_engine_has_no_limit_of_its_own() -> None:
    """The trainer sends them when it has time for it; attempts are not used up meanwhile."""

    async def test() -> None:
        engine = ScriptedEngine(serving(3))
        async with connect(engine, restart_timeout_seconds=0.2, attempts=1) as client:
            client.require_version("student", 3)
            request = asyncio.create_task(ask(client))
            await asyncio.sleep(1.0)
            assert not request.done()
            engine.weight_version = "3"
            assert (await request).weight_version == 3

    run_bounded(test)


def test_an_engine_that_is_down_is_asked_at_once_when_it_may_have_new_weights() -> None:
    """Pauses between the questions have grown long by then."""

    async def test() -> None:
        engines = [ScriptedEngine(serving(1)), ScriptedEngine(serving(1))]
        engines[0].weight_version = "1"
        long = 10 * PATIENCE
        options = {"first_backoff_seconds": long, "longest_backoff_seconds": long}
        async with connect(*engines, **options) as client:
            client.require_version("student", 1)
            await ask(client)
            assert engines[1].checks == ["model_info"]
            for engine in engines:
                engine.handler, engine.weight_version = serving(2), "2"
            client.require_version("student", 2)
            await asyncio.gather(*(ask(client, str(n)) for n in range(4)))
            assert len(engines[1].requests) == 2

    run_bounded(test)


def test_an_engine_that_comes_back_with_its_first_weights() -> None:
    """Restarted between two requests, so that only its answer tells."""

    async def test() -> None:
        engine = ScriptedEngine(serving(3))
        engine.weight_version = "3"
        async with connect(engine) as client:
            client.require_version("student", 3)
            await ask(client)
            engine.handler, engine.weight_version = serving(0), "default"
            task = asyncio.create_task(ask(client))
            await until(lambda: client.counters("student").stale_answers == 1)
            await until(lambda: len(engine.checks) > 4)
            assert not task.done()
            engine.handler, engine.weight_version = serving(3), "3"
            assert (await task).weight_version == 3
            assert client.counters("student").retries == 1

    run_bounded(test)


def test_an_engine_that_failed_proves_its_health_once_and_then_waits_for_weights() -> None:
    async def test() -> None:
        engine, other = ScriptedEngine(serving(3)), ScriptedEngine(serving(3))
        engine.weight_version = other.weight_version = "3"
        async with connect(engine, other) as client:
            client.require_version("student", 3)
            await until(lambda: client._replicas["student"].are_usable)
            engine.handler, engine.weight_version = answers(502), "0"
            while client.counters("student").bad_answers == 0:
                await ask(client)
            await until(lambda: len(engine.checks) > 5)
            assert engine.checks.count("health") == 1
            assert client._replicas["student"].all[0].last_problem == "has weight version 0, not 3"

    run_bounded(test)


def test_an_answer_of_two_versions_is_as_old_as_the_older() -> None:
    async def test() -> None:
        engine = ScriptedEngine(answers(200))  # its tokens are of versions 3 and 4
        engine.weight_version = "4"
        async with connect(engine, attempts=2) as client:
            client.require_version("student", 3)
            await ask(client)
            client.require_version("student", 4)
            with pytest.raises(EngineError, match="answered with weight version 3, not 4"):
                await ask(client)

    run_bounded(test)


def test_what_was_sent_before_a_version_was_required_may_be_older() -> None:
    async def test() -> None:
        began = asyncio.Event()
        proceed = asyncio.Event()

        async def slow(body: dict[str, Any]) -> web.StreamResponse:
            began.set()
            await proceed.wait()
            return await serving(3)(body)

        engine = ScriptedEngine(slow)
        engine.weight_version = "4"
        async with connect(engine) as client:
            task = asyncio.create_task(ask(client))
            await began.wait()
            client.require_version("student", 4)
            proceed.set()
            assert (await task).weight_version == 3

    run_bounded(test)


def test_scores_of_old_weights_are_discarded() -> None:
    async def test() -> None:
        async def old(body: dict[str, Any]) -> web.Response:
            return web.json_response(scored(body, weight_version="1"))

        async def new(body: dict[str, Any]) -> web.Response:
            return web.json_response(scored(body, weight_version="2"))

        engines = [ScriptedEngine(old), ScriptedEngine(new)]
        for engine in engines:
            engine.weight_version = "2"
        async with connect(*engines) as client:
            await score(client, "student", [1, 2, 3], 1)
            client.require_version("student", 2)
            for first in range(6):
                await score(client, "student", [first, 2, 3], 1)
            assert client.counters("student").stale_answers > 0

    run_bounded(test)


def test_an_unknown_version_is_an_error() -> None:
    async def test() -> None:
        engine = ScriptedEngine(serving(3))
        engine.weight_version = "step-3"
        async with connect(engine, restart_timeout_seconds=0.2) as client:
            client.require_version("student", 3)
            with pytest.raises(EngineError, match="'step-3', which is not a number"):
                await ask(client)

    run_bounded(test)
