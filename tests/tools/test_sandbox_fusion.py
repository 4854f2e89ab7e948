"""The SandboxFusion client against an endpoint that answers as told, failures above all."""

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sod_mcore.config import ConfigError
from sod_mcore.tools import (
    InfrastructureError,
    ProgramRunner,
    RetryRule,
    SandboxFusionClient,
    SandboxLimits,
    SandboxResult,
    SandboxUnavailableError,
    choose_sandbox_url,
)
from sod_mcore.tools.sandbox_fusion import driver_program, read_verdict

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LIMITS = SandboxLimits(wall_seconds=2.0, output_bytes=1000)
QUICK = RetryRule(attempts=3, first_wait_seconds=0.01)


def verdict(status: str = "Success", message: str = "", **run: Any) -> dict[str, Any]:
    result = {"status": "Finished", "execution_time": 0.5, "return_code": 0, "stderr": ""}
    return {
        "status": status,
        "message": message,
        "compile_result": None,
        "run_result": {**result, "stdout": "42\n", **run},
    }


@contextlib.asynccontextmanager
async def endpoint(handler: Handler, **settings: Any) -> AsyncIterator[SandboxFusionClient]:
    """A started client of a server that answers its first request, the proof, as a sound one."""
    is_proved = False

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal is_proved
        if not is_proved:
            is_proved = True
            return web.json_response(verdict())
        return await handler(request)

    application = web.Application()
    application.router.add_post("/run_code", answer)
    async with TestServer(application) as server:
        url = str(server.make_url("/run_code"))
        async with SandboxFusionClient(url, LIMITS, retry=QUICK, **settings) as client:
            yield client


def answers(*responses: web.Response | Any) -> tuple[Handler, list[Any]]:
    """A handler that gives these answers in turn (the last one for ever), and what it received."""
    received: list[Any] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        received.append(await request.json())
        response = responses[min(len(received), len(responses)) - 1]
        if isinstance(response, tuple):
            return web.Response(status=response[0], text=response[1])
        return web.json_response(response)

    return handler, received


class TestUrl:
    def test_order(self) -> None:
        environment = {"SOD_SANDBOX_URL": "http://b/run_code"}
        assert choose_sandbox_url("http://a/run_code", environment) == "http://a/run_code"
        assert choose_sandbox_url(None, environment) == "http://b/run_code"
        assert choose_sandbox_url(None, {"SOD_SANDBOX_URL": ""}) is None
        assert choose_sandbox_url(None, {}) is None

    @pytest.mark.parametrize(
        "url",
        [
            "localhost:8080",
            "ftp://a/run_code",
            "http://a:80",
            "http:///",
            "http://[::1/run_code",
            "http://a:99999/run_code",
            "http://a:abc/run_code",
            "http://:80/run_code",
        ],
    )
    def test_faults_name_their_source(self, url: str) -> None:
        with pytest.raises(ConfigError, match=r"tools\.sandbox_url is .*run_code"):
            choose_sandbox_url(url, {})
        with pytest.raises(ConfigError, match="environment variable SOD_SANDBOX_URL is"):
            choose_sandbox_url(None, {"SOD_SANDBOX_URL": url})


class TestVerdict:
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (verdict(), SandboxResult("42\n", "", 0, "finished", 0.5)),
            (
                verdict("Failed", return_code=1, stderr="Traceback"),
                SandboxResult("42\n", "Traceback", 1, "finished", 0.5),
            ),
            (
                verdict("Failed", status_of_run="TimeLimitExceeded", return_code=None),
                SandboxResult("42\n", "", None, "timeout", 0.5),
            ),
            (
                verdict("Failed", return_code=137, stdout=None, execution_time=None),
                SandboxResult("", "", 137, "killed", 0.0),
            ),
            (
                verdict("Failed", "output_limit", return_code=137, stdout="x" * 1000),
                SandboxResult("x" * 1000, "", None, "output_limit", 0.5),
            ),
            (
                verdict(stdout="x" * 1001),
                SandboxResult("x" * 1000, "", None, "output_limit", 0.5),
            ),
        ],
    )
    def test_of_a_program(self, answer: dict[str, Any], expected: SandboxResult) -> None:
        run = answer["run_result"]
        run["status"] = run.pop("status_of_run", run["status"])
        assert read_verdict(answer, LIMITS) == expected


@pytest.mark.asyncio
class TestRequest:
    async def test_body(self) -> None:
        handler, received = answers(verdict())
        async with endpoint(handler) as client:
            runner: ProgramRunner = client
            await runner.run("print(1)", stdin="a\udc80b")
        (body,) = received
        program = body.pop("code")
        assert body == {
            "compile_timeout": 2.0,
            "run_timeout": 2.0,
            "stdin": "a?b",
            "memory_limit_MB": 512,
            "language": "python",
            "files": {},
            "fetch_files": [],
        }
        assert program == driver_program(
            "print(1)", print_last_expression=False, short_traceback=False
        )

    async def test_http_timeout_is_above_that_of_the_program(self) -> None:
        async with endpoint(answers(verdict())[0]) as client:
            assert client._session is not None
            assert client._session.timeout.total == 2 + 2 + 10


def run_driver(code: str, stdin: str = "", **options: bool) -> tuple[str, str, int]:
    """As the endpoint would: another Python, a file, an input."""
    options = {"print_last_expression": True, "short_traceback": False, **options}
    done = subprocess.run(
        [sys.executable, "-I", "-c", driver_program(code, **options)],
        input=stdin.encode(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.stdout.decode(), done.stderr.decode(), done.returncode


class TestDriver:
    def test_last_expression_and_input(self) -> None:
        assert run_driver("x = input()\nx * 2", stdin="ab\n") == ("abab\n", "", 0)
        assert run_driver("x = 1\n5", print_last_expression=False) == ("", "", 0)
        assert run_driver("'ü\udc80'.encode('utf-8', 'replace')")[2] == 1  # no source text
        assert run_driver("print('ü', __name__)")[0] == "ü __main__\n"

    def test_tracebacks(self) -> None:
        code = "def f():\n    return {}['a']\nf()"
        _, errors, return_code = run_driver(code)
        assert return_code == 1
        assert errors.startswith('Traceback (most recent call last):\n  File "<code>", line 3')
        assert "return {}['a']" in errors
        assert "run_here" not in errors
        assert run_driver(code, short_traceback=True)[1] == "KeyError: 'a'\n"
        assert run_driver("print((1", short_traceback=True)[1].startswith("SyntaxError: ")
        assert run_driver("import sys; sys.exit(7)")[2] == 7

    def test_hostile_source_is_not_parsed_here(self) -> None:
        for code in ("(" * 100_000, "\0", "'''", '"""\\'):
            assert run_driver(code)[2] != 0


@pytest.mark.asyncio
class TestFailures:
    @pytest.mark.parametrize(
        "failure",
        [
            (504, "gateway"),
            (500, "oops"),
            (503, "full"),
            (429, "slow down"),
            (408, "too slow"),
            {"status": "SandboxError", "message": "no docker", "run_result": None},
        ],
    )
    async def test_those_that_may_pass_are_tried_again(self, failure: Any) -> None:
        handler, received = answers(failure, failure, verdict(stdout="ok"))
        async with endpoint(handler) as client:
            assert (await client.run("1")).stdout == "ok"
        assert len(received) == 3
        handler, received = answers(failure)
        async with endpoint(handler) as client:
            with pytest.raises(InfrastructureError, match=r"/run_code") as error:
                await client.run("1")
        assert error.type is InfrastructureError  # logs print the name of the class
        assert len(received) == 3

    @pytest.mark.parametrize(
        "failure",
        [
            (404, "no such page"),
            (422, "bad field"),
            (200, "<html>not JSON</html>"),
            (200, "[" * 100_000),
            [],
            {},
            {"status": "Success"},
            {"status": "Success", "run_result": None},
            {"status": "Great", "run_result": {}},
            {"status": "Success", "run_result": {}},
            verdict(return_code=None),
            verdict(stdout=5),
            {"status": "Failed", "run_result": {"status": "Error", "stderr": "exception"}},
        ],
    )
    async def test_others_are_told_at_once(self, failure: Any) -> None:
        handler, received = answers(failure)
        async with endpoint(handler) as client:
            with pytest.raises(InfrastructureError, match=r"/run_code"):
                await client.run("1")
        assert len(received) == 1

    async def test_endless_answer(self) -> None:
        """A program printed so much that its output alone is longer than any fair answer."""

        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                while True:
                    await response.write(b"x" * 65536)
            return response

        async with endpoint(handler) as client:
            async with asyncio.timeout(20):
                result = await client.run("1")
        assert result.status == "output_limit"

    async def test_connection_that_breaks(self) -> None:
        count = 0

        async def handler(request: web.Request) -> web.StreamResponse:
            nonlocal count
            count += 1
            assert request.transport is not None
            if count < 3:
                request.transport.close()
            return web.json_response(verdict(stdout="third"))

        async with endpoint(handler) as client:
            assert (await client.run("1")).stdout == "third"

    async def test_no_answer_in_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sod_mcore.tools.sandbox_fusion._EXTRA_SECONDS", -3.5)
        count = 0

        async def handler(request: web.Request) -> web.StreamResponse:
            nonlocal count
            count += 1
            await asyncio.sleep(2)
            return web.json_response(verdict())

        async with endpoint(handler) as client:
            with pytest.raises(InfrastructureError, match=r"gave no answer in 0\.5 s"):
                await client.run("1")
        assert count == 1

    async def test_closed_client(self) -> None:
        async with endpoint(answers(verdict())[0]) as client:
            pass
        with pytest.raises(InfrastructureError, match="not started, or was closed"):
            await client.run("1")


@pytest.mark.asyncio
class TestStart:
    async def test_nobody_listens(self, unused_tcp_port: int) -> None:
        url = f"http://127.0.0.1:{unused_tcp_port}/run_code"
        client = SandboxFusionClient(url, LIMITS, retry=QUICK)
        with pytest.raises(SandboxUnavailableError) as error:
            await client.start()
        assert url in str(error.value)
        for mend in ("tools.sandbox_url", "SOD_SANDBOX_URL", "python -m sod_mcore.tools"):
            assert mend in str(error.value)

    async def test_no_connection_in_time(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A port whose queue is full: the kernel leaves further connections without an answer."""
        monkeypatch.setattr("sod_mcore.tools.sandbox_fusion._CONNECT_SECONDS", 0.3)
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1))
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(listener.getsockname())
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/run_code"
            client = SandboxFusionClient(url, LIMITS, retry=QUICK)
            with (
                caplog.at_level(logging.WARNING),
                pytest.raises(SandboxUnavailableError, match=r"took no connection in 0\.3 s"),
            ):
                await client.start()
        assert len([r for r in caplog.records if "trying again" in r.getMessage()]) == 2

    async def test_something_else_listens(self) -> None:
        application = web.Application()
        application.router.add_post("/run_code", answers(verdict(stdout="hello"))[0])
        async with TestServer(application) as server:
            for path, message in (("/run_code", "trivial program"), ("/other", "HTTP 404")):
                client = SandboxFusionClient(str(server.make_url(path)), LIMITS, retry=QUICK)
                with pytest.raises(SandboxUnavailableError, match=message):
                    await client.start()
                await client.close()


@pytest.mark.asyncio
class TestConcurrency:
    async def test_bounded_and_first_come_first_served(self) -> None:
        running = most = 0
        order: list[str] = []

        async def handler(request: web.Request) -> web.StreamResponse:
            nonlocal running, most
            order.append((await request.json())["stdin"])
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.05)
            running -= 1
            return web.json_response(verdict())

        async with endpoint(handler, max_concurrency=2) as client:
            await asyncio.gather(*(client.run("1", stdin=str(i)) for i in range(8)))
        assert most == 2
        # Of the two under way at a time, either may arrive first.
        assert [sorted(order[i : i + 2]) for i in range(0, 8, 2)] == [
            [str(i), str(i + 1)] for i in range(0, 8, 2)
        ]

    async def test_cancelled_and_failed_calls_free_their_slots(self) -> None:
        async def handler(request: web.Request) -> web.StreamResponse:
            body = await request.json()
            if body["stdin"] == "hang":
                await asyncio.sleep(60)
            return web.json_response(verdict(), status=400 if body["stdin"] == "fail" else 200)

        async with endpoint(handler, max_concurrency=1) as client:
            for _ in range(3):
                running = asyncio.create_task(client.run("1", stdin="hang"))
                waiting = asyncio.create_task(client.run("1", stdin="hang"))
                await asyncio.sleep(0.1)
                for task in (waiting, running):
                    task.cancel()
                await asyncio.wait([running, waiting])
                with pytest.raises(InfrastructureError):
                    await client.run("1", stdin="fail")
            async with asyncio.timeout(10):
                assert (await client.run("1")).stdout == "42\n"
