"""What the client does when engines fail: who is asked next, who waits, and what it says."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sod_mcore.serving.client import EngineClient
from sod_mcore.serving.json_http import EngineError
from sod_mcore.serving.messages import Generation
from sod_mcore.serving.replicas import Affinity
from sod_mcore.serving.scoring import Scores, score
from tests.serving.scripted_generation import (
    PATIENCE,
    SAMPLING,
    Handler,
    ScriptedEngine,
    answers,
    connect,
    endpoints,
    generated,
    never,
    scored,
    until,
)


async def ask(client: EngineClient, rid: str = "r", key: str | None = None) -> Generation:
    affinity = None if key is None else Affinity(key)
    return await client.generate("student", [1, 2], SAMPLING, rid=rid, affinity=affinity)


def serving(version: int) -> Handler:
    """Samples with weights of one version."""

    async def handler(body: dict[str, Any]) -> web.Response:
        meta = {"weight_version": str(version), "weight_versions": None}
        return web.json_response(generated([7], **meta))

    return handler


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await test()

    asyncio.run(bounded())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def raw_server(answer: bytes) -> AsyncIterator[str]:
    """Reads a request, writes ``answer`` and closes the connection; never is healthy."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer if head.startswith(b"POST /generate") else b"")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


CUT_OFF = b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"meta_in'
GARBAGE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{nope"
OTHER_JSON = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"


@pytest.mark.parametrize(
    ("answer", "counter"),
    [
        (b"", "connection_failures"),
        (CUT_OFF, "connection_failures"),
        (b"no HTTP at all\r\n\r\n", "connection_failures"),
        (GARBAGE, "bad_answers"),
        (OTHER_JSON, "bad_answers"),
    ],
)
def test_an_engine_that_answers_nonsense_is_left_for_another(answer: bytes, counter: str) -> None:
    async def test() -> None:
        good = ScriptedEngine(answers(200))
        async with (
            raw_server(answer) as bad_url,
            TestServer(good.application()) as server,
            EngineClient(endpoints(bad_url, str(server.make_url("")).rstrip("/"))) as client,
        ):
            for n in range(6):
                assert len((await ask(client, str(n))).token_ids) == 3
            counters = client.counters("student")
            assert (counters.requests, counters.retries, getattr(counters, counter)) == (6, 1, 1)
            assert len(good.requests) == 6

    run(test)


def test_an_engine_that_refuses_connections() -> None:
    async def test() -> None:
        good = ScriptedEngine(answers(200))
        dead = f"http://127.0.0.1:{free_port()}"
        async with (
            TestServer(good.application()) as server,
            EngineClient(endpoints(dead, str(server.make_url("")).rstrip("/"))) as client,
        ):
            assert len((await ask(client)).token_ids) == 3
            assert client.counters("student").connection_failures == 1

    run(test)


def test_an_engine_that_fails_is_used_again_when_it_is_well() -> None:
    """5xx for a while; its health is asked meanwhile, with pauses, and nothing is sent to it."""

    async def test() -> None:
        first, second = ScriptedEngine(answers(500, 200)), ScriptedEngine(answers(200))
        first.is_healthy = False
        async with connect(first, second) as client:
            await ask(client, "a")
            await until(lambda: len(first.checks) > 3)
            for n in range(4):
                await ask(client, f"b{n}")
            assert len(first.requests) == 1
            assert set(first.checks) == {"health"}
            assert not second.checks
            first.is_healthy = True
            await until(lambda: client._replicas["student"].all[0].is_up)
            for n in range(4):
                await ask(client, f"c{n}")
            assert len(first.requests) == 3, "idle engines take turns"
            checks = len(first.checks)
            await asyncio.sleep(0.2)
            assert len(first.checks) == checks, "an engine that is up is left alone"

    run(test)


def test_a_trajectory_moves_away_from_a_failed_engine_and_stays_there() -> None:
    async def test() -> None:
        engines = [ScriptedEngine(answers(200)) for _ in range(2)]
        async with connect(*engines) as client:
            for _ in range(3):
                await ask(client, key="trajectory")
            assert [len(engine.requests) for engine in engines] == [3, 0]
            engines[0].handler = answers(502)
            engines[0].is_healthy = False
            await ask(client, key="trajectory")
            engines[0].handler, engines[0].is_healthy = answers(200), True
            await until(lambda: client._replicas["student"].all[0].is_up)
            await ask(client, key="trajectory")
            assert [len(engine.requests) for engine in engines] == [4, 2]

    run(test)


def test_a_busy_engine_gets_the_request_again() -> None:
    """429 says nothing about its health."""

    async def test() -> None:
        engine = ScriptedEngine(answers(429, 429, 200))
        async with connect(engine) as client:
            assert len((await ask(client)).token_ids) == 3
            assert not engine.checks
            assert client.counters("student").retries == 2
            assert client.counters("student").bad_answers == 0

    run(test)


def test_a_refused_request_says_nothing_about_the_engine() -> None:
    async def test() -> None:
        engine = ScriptedEngine(answers(400, 200))
        async with connect(engine) as client:
            with pytest.raises(EngineError, match="answered 400"):
                await ask(client)
            assert len((await ask(client)).token_ids) == 3
            assert not engine.checks

    run(test)


def test_an_engine_that_does_not_answer_in_time() -> None:
    """The request fails; others go elsewhere until the engine is well."""

    async def test() -> None:
        slow, quick = ScriptedEngine(never), ScriptedEngine(answers(200))
        slow.is_healthy = False
        async with connect(slow, quick, request_timeout_seconds=2.0) as client:
            with pytest.raises(EngineError, match="student: no answer within 2 s"):
                await ask(client, "late")
            for n in range(3):
                await ask(client, str(n))
            await until(lambda: slow.aborted == ["late"])
            assert len(slow.requests) == 1
            assert client.counters("student").timeouts == 1

    run(test)


def test_requests_wait_while_all_engines_are_down() -> None:
    """They go on when one is back; the wait is neither a try nor part of the timeout."""

    async def test() -> None:
        engine = ScriptedEngine(answers(503))
        engine.is_healthy = False
        async with connect(engine, attempts=2, request_timeout_seconds=PATIENCE) as client:
            tasks = [asyncio.create_task(ask(client, str(n))) for n in range(5)]
            await until(lambda: len(engine.requests) == 5)
            await until(lambda: len(engine.checks) > 5)
            assert not any(task.done() for task in tasks)
            engine.handler, engine.is_healthy = answers(200), True
            for generation in await asyncio.gather(*tasks):
                assert len(generation.token_ids) == 3
            assert len(engine.requests) == 10
            assert client.counters("student").seconds_waited > 0

    run(test)


def test_the_wait_does_not_use_up_the_timeout() -> None:
    async def test() -> None:
        engine = ScriptedEngine(answers(503, 200))
        engine.is_healthy = False
        async with connect(engine, request_timeout_seconds=3.0) as client:
            task = asyncio.create_task(ask(client))
            await until(lambda: client.counters("student").bad_answers == 1)
            await asyncio.sleep(3.5)
            engine.is_healthy = True
            await task
            assert client.counters("student").seconds_waited > 3.0

    run(test)


def test_a_wait_that_is_too_long_names_every_engine() -> None:
    async def test() -> None:
        ill = ScriptedEngine(answers(500))
        ill.is_healthy = False
        dead = f"http://127.0.0.1:{free_port()}"
        async with TestServer(ill.application()) as server:
            url = str(server.make_url("")).rstrip("/")
            async with EngineClient(
                endpoints(dead, url), restart_timeout_seconds=0.5, first_backoff_seconds=0.01
            ) as client:
                with pytest.raises(EngineError) as caught:
                    await ask(client)
        message = str(caught.value)
        assert message.startswith("student: none of its 2 engine(s) could be used for 0.5 s")
        assert "serving.restart_timeout_seconds" in message
        assert f"{dead}: {dead}/health: ClientConnectorError" in message
        assert f"{url}: {url}/health answered 503" in message
        assert caught.value.retryable

    run(test)


def test_waiting_requests_are_not_in_flight() -> None:
    """What holds requests back, while weights change, must not wait for those that wait."""

    async def test() -> None:
        in_flight = 0

        @asynccontextmanager
        async def admission() -> AsyncIterator[None]:
            nonlocal in_flight
            in_flight += 1
            yield
            in_flight -= 1

        engine = ScriptedEngine(never)
        engine.is_healthy = False
        async with connect(engine, admission=admission) as client:
            task = asyncio.create_task(ask(client))
            await until(lambda: in_flight == 1 and len(engine.requests) == 1)
            replicas = client._replicas["student"]
            client._connections.recovery.mark_down(replicas, replicas.all[0], "a test", "failed")
            other = asyncio.create_task(ask(client))
            await asyncio.sleep(0.05)
            assert in_flight == 1
            engine.handler, engine.is_healthy = answers(200), True
            await other
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(test)


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

    run(test)


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

    run(test)


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

    run(test)


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

    run(test)


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

    run(test)


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

    run(test)


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

    run(test)


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

    run(test)


def test_an_unknown_version_is_an_error() -> None:
    async def test() -> None:
        engine = ScriptedEngine(serving(3))
        engine.weight_version = "step-3"
        async with connect(engine, restart_timeout_seconds=0.2) as client:
            client.require_version("student", 3)
            with pytest.raises(EngineError, match="'step-3', which is not a number"):
                await ask(client)

    run(test)


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

    run(test)


def test_a_quick_scoring_request_is_not_hedged() -> None:
    async def test() -> None:
        engines = [ScriptedEngine(quick), ScriptedEngine(quick)]
        async with connect(*engines, hedge_after_seconds=PATIENCE) as client:
            await scores_of(client)
            assert client.counters("student").hedged == 0

    run(test)


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

    run(test)


def test_both_engines_may_fail() -> None:
    async def test() -> None:
        async def slow(body: dict[str, Any]) -> web.Response:
            await asyncio.sleep(0.1)
            return web.Response(status=500)

        engines = [ScriptedEngine(slow), ScriptedEngine(slow)]
        async with connect(*engines, hedge_after_seconds=0.02, attempts=1) as client:
            with pytest.raises(EngineError, match="gave up after 1 tries"):
                await scores_of(client)

    run(test)


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

    run(test)


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

    run(test)


def test_a_hedge_ends_at_the_deadline_of_the_request() -> None:
    async def test() -> None:
        engines = [ScriptedEngine(never), ScriptedEngine(never)]
        settings = {"hedge_after_seconds": 0.05, "request_timeout_seconds": 3.0}
        async with connect(*engines, **settings) as client:
            with pytest.raises(EngineError, match="no answer within 3 s"):
                await scores_of(client)
            assert client.counters("student").hedged == 1
            await until(lambda: all(len(engine.aborted) == 1 for engine in engines))

    run(test)
