"""Serves this machine's sandbox over HTTP as a SandboxFusion endpoint, so that others can use it.

`POST /run_code` takes SandboxFusion's request and gives its answer, for Python only. A program's
failure is an answer of status Failed; a failure of the sandbox is one of status SandboxError, or
HTTP 503 where more programs wait than may. Clients may lower the limits and never raise them. There
is no authentication: whoever reaches the port may run programs in the sandbox.
"""

import asyncio
import json
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from aiohttp import web

from sod_mcore.tools.interface import InfrastructureError
from sod_mcore.tools.limits import MEBIBYTE
from sod_mcore.tools.runner import SandboxResult
from sod_mcore.tools.sandbox import Sandbox
from sod_mcore.tools.sandbox_fusion import OUTPUT_LIMIT_MESSAGE

MAX_REQUEST_BYTES = 32 * MEBIBYTE
READ_SECONDS = 30.0
"""Longest time that a request may take to arrive."""
_KILLED_CODE = 128 + signal.SIGKILL
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHUTDOWN_SECONDS = 5.0
_LANGUAGES = ("python",)


@dataclass(frozen=True)
class RunCodeRequest:
    """What a client asks for. None leaves the server's limit."""

    code: str
    stdin: str
    run_seconds: float | None
    memory_bytes: int | None

    @classmethod
    def read(cls, body: object) -> "RunCodeRequest":
        """Check a decoded body. Fields that no Python program needs are ignored.

        Raises:
            ValueError: the message is for the client.
        """
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        language = body.get("language", "python")
        if language not in _LANGUAGES:
            raise ValueError(f"language is {language!r}; this server runs {', '.join(_LANGUAGES)}")
        if body.get("files") or body.get("fetch_files"):
            raise ValueError("files and fetch_files must be empty; this server keeps no files")
        code, stdin = body.get("code"), body.get("stdin")
        if not isinstance(code, str):
            raise ValueError("code must be a string")
        if stdin is not None and not isinstance(stdin, str):
            raise ValueError("stdin must be a string or null")
        mebibytes = _number(body, "memory_limit_MB")
        if mebibytes is not None and mebibytes < 0:
            mebibytes = None  # SandboxFusion's own default, -1: no limit asked for
        seconds = _number(body, "run_timeout")
        if seconds is not None and seconds <= 0:
            raise ValueError(f"run_timeout is {seconds:g}; give seconds above 0")
        memory = None if mebibytes is None else int(mebibytes * MEBIBYTE)
        return cls(code, stdin or "", seconds, memory)


def _number(body: Mapping[str, object], name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ValueError(f"{name} must be a number")
    return value


def describe(result: SandboxResult) -> dict[str, object]:
    """SandboxFusion's answer about a program that ran."""
    is_timeout = result.status == "timeout"
    return_code = result.return_code
    if result.status == "output_limit":
        return_code = _KILLED_CODE
    return {
        "status": "Success" if result.status == "finished" and return_code == 0 else "Failed",
        "message": OUTPUT_LIMIT_MESSAGE if result.status == "output_limit" else "",
        "compile_result": None,
        "run_result": {
            "status": "TimeLimitExceeded" if is_timeout else "Finished",
            "execution_time": result.wall_seconds,
            "return_code": return_code,
            "stdout": result.stdout,
            "stderr": result.stderr,
        },
        "executor_pod_name": None,
        "files": {},
    }


def describe_failure(status: str, message: str) -> dict[str, object]:
    """The answer where no program ran."""
    return {"status": status, "message": message, "compile_result": None, "run_result": None}


class SandboxServer:
    """The HTTP face of a started sandbox, which its owner closes."""

    def __init__(
        self, sandbox: Sandbox, *, max_requests: int, read_seconds: float = READ_SECONDS
    ) -> None:
        """Remember the settings.

        Args:
            sandbox: runs the programs.
            max_requests: those that arrive, run and wait; more are refused. So bodies hold at most
                this many times `MAX_REQUEST_BYTES`.
            read_seconds: longest time that a request may take to arrive.
        """
        self._sandbox = sandbox
        self._max_requests = max_requests
        self._read_seconds = read_seconds
        self._requests = 0

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application(client_max_size=MAX_REQUEST_BYTES)
        application.router.add_post("/run_code", self._run_code)
        application.router.add_get("/health", self._health)
        return application

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "status": "ok",
                "isolated": self._sandbox.is_isolated,
                "requests": self._requests,
                "max_requests": self._max_requests,
                "limits": asdict(self._sandbox.limits),
            }
        )

    async def _run_code(self, http_request: web.Request) -> web.Response:
        size = http_request.content_length
        if size is not None and size > MAX_REQUEST_BYTES:
            return _refusal("Failed", f"{size} bytes; {MAX_REQUEST_BYTES} are allowed", 413)
        # Counted before the body is read: bodies wait in memory too.
        if self._requests >= self._max_requests:
            text = f"{self._requests} programs run or wait already"
            return _refusal("SandboxError", text, 503, {"Retry-After": "1"})
        self._requests += 1
        try:
            return await self._answer(http_request)
        finally:
            self._requests -= 1

    async def _answer(self, http_request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(self._read_seconds):
                body = await http_request.read()
        except TimeoutError:
            text = f"the request did not arrive in {self._read_seconds:g} s"
            return _refusal("SandboxError", text, 408, {"Connection": "close"})
        try:
            request = RunCodeRequest.read(json.loads(body))
        except (ValueError, RecursionError) as error:
            return _refusal("Failed", str(error), 400)
        try:
            result = await self._sandbox.run(
                request.code,
                stdin=request.stdin,
                wall_seconds=request.run_seconds,
                memory_bytes=request.memory_bytes,
            )
        except InfrastructureError as error:
            return web.json_response(describe_failure("SandboxError", str(error)))
        return web.json_response(describe(result))


def _refusal(
    status: str, message: str, code: int, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.json_response(describe_failure(status, message), status=code, headers=headers)


async def serve(
    sandbox: Sandbox,
    host: str,
    port: int,
    *,
    max_requests: int,
    read_seconds: float = READ_SECONDS,
) -> None:
    """Serve until SIGINT or SIGTERM, then end every program. Prints the address once it answers.

    Raises:
        SandboxUnavailableError: this machine cannot isolate programs; nothing was served.
        OSError: the address is taken.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stopped.set)
    async with sandbox:
        # A client that goes away frees its slot, and its program ends.
        runner = web.AppRunner(
            SandboxServer(
                sandbox, max_requests=max_requests, read_seconds=read_seconds
            ).application(),
            handler_cancellation=True,
            shutdown_timeout=_SHUTDOWN_SECONDS,
            access_log=None,
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            await site.start()
            bound_port = runner.addresses[0][1]
            print(f"serving http://{host}:{bound_port}/run_code", flush=True)
            await stopped.wait()
            # First the programs, so that their requests are answered and nobody is waited for.
            await site.stop()
            await sandbox.close()
        finally:
            await runner.cleanup()
