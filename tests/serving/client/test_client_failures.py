"""What the client does when engines fail: who is asked next, who waits, and what it says."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp.test_utils import TestServer

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.json_http import EngineError
from tests.serving.scripted_generation import (
    PATIENCE,
    ScriptedEngine,
    answers,
    ask,
    connect,
    endpoints,
    never,
    run_bounded,
    until,
)


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

    run_bounded(test)


def test_an_engine_is_found_where_the_fleet_has_started_it_again() -> None:
    """A request waits for it; the address of an engine that answers is not looked up."""

    async def test() -> None:
        moved, dead = ScriptedEngine(answers(200)), f"http://127.0.0.1:{free_port()}"
        asked: list[str] = []
        written = [dead]

        def find_engines(model: str) -> list[str]:
            asked.append(model)
            return written

        async with (
            TestServer(moved.application()) as server,
            EngineClient(
                endpoints(dead), find_engines=find_engines, first_backoff_seconds=0.01
            ) as client,
        ):
            waiting = asyncio.create_task(ask(client))
            await until(lambda: len(asked) > 2)
            written[:] = [str(server.make_url("")).rstrip("/")]
            assert len((await waiting).token_ids) == 3
            before = len(asked)
            await ask(client, "again")
            assert (len(moved.requests), len(asked)) == (2, before)
            assert set(asked) == {"student"}

    run_bounded(test)


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

    run_bounded(test)


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

    run_bounded(test)


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

    run_bounded(test)


def test_a_busy_engine_gets_the_request_again() -> None:
    """429 says nothing about its health."""

    async def test() -> None:
        engine = ScriptedEngine(answers(429, 429, 200))
        async with connect(engine) as client:
            assert len((await ask(client)).token_ids) == 3
            assert not engine.checks
            assert client.counters("student").retries == 2
            assert client.counters("student").bad_answers == 0

    run_bounded(test)


def test_a_refused_request_says_nothing_about_the_engine() -> None:
    async def test() -> None:
        engine = ScriptedEngine(answers(400, 200))
        async with connect(engine) as client:
            with pytest.raises(EngineError, match="answered 400"):
                await ask(client)
            assert len((await ask(client)).token_ids) == 3
            assert not engine.checks

    run_bounded(test)


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

    run_bounded(test)


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

    run_bounded(test)


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

    run_bounded(test)


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
        assert message.startswith("student: none of its 2 engine(s) answered for 0.5 s")
        assert "serving.restart_timeout_seconds" in message
        assert f"{dead}: {dead}/health: ClientConnectorError" in message
        assert f"{url}: {url}/health answered 503" in message
        assert caught.value.retryable

    run_bounded(test)


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

    run_bounded(test)
