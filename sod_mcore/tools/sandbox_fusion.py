"""Runs programs on a SandboxFusion endpoint over HTTP, this project's own server among them.

Whatever is not a program's verdict is an `InfrastructureError`: an endpoint that is down must never
look like a wrong program. The endpoint runs plain Python, so a program travels inside a small
driver, the text of `sandbox_bootstrap.py`; nothing is parsed here.
"""

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import urlsplit

import aiohttp

from sod_mcore.config import ConfigError
from sod_mcore.tools.interface import InfrastructureError, SandboxUnavailableError
from sod_mcore.tools.interpreter import bootstrap_source
from sod_mcore.tools.limits import MEBIBYTE, SandboxLimits
from sod_mcore.tools.runner import SandboxResult, SandboxStatus

logger = logging.getLogger(__name__)

URL_VARIABLE = "SOD_SANDBOX_URL"
OUTPUT_LIMIT_MESSAGE = "output_limit"
"""`message` by which our server says why it ended a program; others leave the field empty."""

_EXTRA_SECONDS = 10.0  # HTTP timeout above the time that the program may take
_CONNECT_SECONDS = 10.0
_KILLED_CODES = (137, -9)
_BYTES_OF_A_CHARACTER = 6  # in JSON at most: \u0000
_PASSING_STATUSES = (408, 429, *range(500, 600))


def choose_sandbox_url(
    configured: str | None, environment: Mapping[str, str] = os.environ
) -> str | None:
    """The endpoint that runs programs: `tools.sandbox_url`, else SOD_SANDBOX_URL, else None, which
    means the local sandbox.

    Raises:
        ConfigError: it is not the address of an endpoint.
    """
    url = configured or environment.get(URL_VARIABLE) or None
    if url is None:
        return None
    if not _is_endpoint(url):
        source = "tools.sandbox_url" if configured else f"the environment variable {URL_VARIABLE}"
        raise ConfigError(
            f"{source} is {url!r}; it must be a whole address, as http://127.0.0.1:8080/run_code"
        )
    return url


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # Reading the port raises ValueError where it is none.
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and has_host and bool(parts.path.strip("/"))


@dataclass(frozen=True)
class RetryRule:
    """What becomes of a request that failed for a reason that may pass.

    Attributes:
        attempts: tries in total.
        first_wait_seconds: before the second try; doubled for each one after.
    """

    attempts: int = 3
    first_wait_seconds: float = 1.0


class _PassingError(InfrastructureError):
    """A failure of the endpoint that another try may not meet. Never leaves this module."""


class SandboxFusionClient:
    """A `ProgramRunner` on another machine. Use it as an asynchronous context manager, or call
    `start` and `close`."""

    def __init__(
        self,
        url: str,
        limits: SandboxLimits | None = None,
        *,
        max_concurrency: int = 16,
        retry: RetryRule | None = None,
    ) -> None:
        """Remember the settings; nothing is sent.

        Args:
            url: the whole endpoint, `http://host:port/run_code`.
            limits: of one program. Time, memory and output are asked for; the rest is the
                endpoint's own.
            max_concurrency: requests under way at a time; further calls wait, first come first
                served.
            retry: for failures that may pass.
        """
        if max_concurrency < 1:
            raise ValueError(
                f"SandboxFusionClient: max_concurrency = {max_concurrency}: give at least 1"
            )
        self.url = url
        self._limits = limits or SandboxLimits()
        self._retry = retry or RetryRule()
        self._max_concurrency = max_concurrency
        self._slots = asyncio.Semaphore(max_concurrency)
        self._session: aiohttp.ClientSession | None = None

    @property
    def limits(self) -> SandboxLimits:
        """What one program may use."""
        return self._limits

    async def start(self) -> None:
        """Connect, and run one trivial program as a proof.

        Raises:
            SandboxUnavailableError: the endpoint does not answer as one; the message names it.
        """
        if self._session is not None:
            raise RuntimeError("this SandboxFusionClient is already started")
        seconds = 2 * self._limits.wall_seconds + _EXTRA_SECONDS
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=seconds, connect=_CONNECT_SECONDS),
            connector=aiohttp.TCPConnector(limit=self._max_concurrency),
        )
        try:
            result = await self.run("6 * 7", print_last_expression=True)
        except BaseException as error:
            await self.close()
            if isinstance(error, InfrastructureError):
                raise self._unavailable(str(error)) from error
            raise
        if result.stdout != "42\n":
            await self.close()
            raise self._unavailable(f"it ran a trivial program and gave {result}")

    async def run(
        self,
        code: str,
        *,
        stdin: str = "",
        print_last_expression: bool = False,
        short_traceback: bool = False,
    ) -> SandboxResult:
        """Run one program and return what it did; see `ProgramRunner.run`.

        Raises:
            InfrastructureError: nothing is known about the program. The call may be repeated.
        """
        body = self._body(
            driver_program(
                code, print_last_expression=print_last_expression, short_traceback=short_traceback
            ),
            stdin,
        )
        async with self._slots:
            wait = self._retry.first_wait_seconds
            for _ in range(self._retry.attempts - 1):
                try:
                    return await self._attempt(body)
                except _PassingError as error:
                    logger.warning("%s; trying again in %g s", error, wait)
                await asyncio.sleep(wait)
                wait *= 2
            try:
                return await self._attempt(body)
            except _PassingError as error:
                raise InfrastructureError(str(error)) from error

    async def close(self) -> None:
        """Close the connections; running calls fail. May be called twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def __aenter__(self) -> "SandboxFusionClient":
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _body(self, program: str, stdin: str) -> dict[str, object]:
        return {
            "compile_timeout": self._limits.wall_seconds,
            "run_timeout": self._limits.wall_seconds,
            "code": program,
            # Lone surrogates are no text to a strict server. Not null, which may mean a pipe that
            # stays open.
            "stdin": stdin.encode("utf-8", "replace").decode("utf-8"),
            "memory_limit_MB": self._limits.memory_bytes // MEBIBYTE,
            "language": "python",
            "files": {},
            "fetch_files": [],
        }

    async def _attempt(self, body: Mapping[str, object]) -> SandboxResult:
        if self._session is None:
            raise InfrastructureError("the SandboxFusion client is not started, or was closed")
        try:
            async with self._session.post(self.url, json=body) as response:
                if response.status != 200:
                    text = (await response.content.read(500)).decode("utf-8", "replace")
                    may_pass = response.status in _PASSING_STATUSES
                    failure = _PassingError if may_pass else InfrastructureError
                    raise failure(f"{self.url} answered HTTP {response.status}: {text}")
                answer = await self._read(response)
        except aiohttp.ConnectionTimeoutError as error:
            message = f"{self.url} took no connection in {_CONNECT_SECONDS:g} s"
            raise _PassingError(message) from error
        except TimeoutError as error:
            # Not tried again: the endpoint is there and has more to do than it can.
            seconds = 2 * self._limits.wall_seconds + _EXTRA_SECONDS
            raise InfrastructureError(f"{self.url} gave no answer in {seconds:g} s") from error
        except aiohttp.ClientError as error:
            raise _PassingError(f"{self.url}: {error or type(error).__name__}") from error
        if answer is None:
            return SandboxResult("", "", None, "output_limit", 0.0)
        return self._understand(answer)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes | None:
        """The answer, or None if it is so long that the program must have printed too much."""
        room = 2 * _BYTES_OF_A_CHARACTER * self._limits.output_bytes + MEBIBYTE
        answer = bytearray()
        async for chunk in response.content.iter_any():
            answer += chunk
            if len(answer) > room:
                response.close()
                return None
        return bytes(answer)

    def _understand(self, answer: bytes) -> SandboxResult:
        try:
            body = json.loads(answer)
            if body["status"] == "SandboxError":
                message = str(body.get("message"))[:500]
                raise _PassingError(f"{self.url} reports a failure of its own: {message}")
            return read_verdict(body, self._limits)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            text = answer[:500].decode("utf-8", "replace")
            raise InfrastructureError(
                f"{self.url} gave no SandboxFusion answer ({error!r}): {text}"
            ) from error

    def _unavailable(self, reason: str) -> SandboxUnavailableError:
        return SandboxUnavailableError(
            f"no SandboxFusion endpoint works at {self.url}: {reason}\nGive the address of one as "
            f"tools.sandbox_url or in the environment variable {URL_VARIABLE}; start one with "
            "`python -m sod_mcore.tools --port 8080`; or leave both unset for the local sandbox."
        )


def driver_program(code: str, *, print_last_expression: bool, short_traceback: bool) -> str:
    """A program that runs `code` as the local sandbox would: as `__main__`, with `<code>` as its
    name in tracebacks."""
    request = {
        "code": code,
        "print_last_expression": print_last_expression,
        "short_traceback": short_traceback,
    }
    return f"{bootstrap_source()}\nrun_here({request!a})\n"


def read_verdict(answer: Mapping[str, object], limits: SandboxLimits) -> SandboxResult:
    """What an answer says about the program.

    A run status of Error is no verdict: SandboxFusion gives it for exceptions of its own.

    Raises:
        ValueError, KeyError, TypeError: it is not an answer about a program that was run.
    """
    if answer["status"] not in ("Success", "Failed"):
        raise ValueError(f"status {answer['status']!r}")
    run = answer["run_result"]
    if not isinstance(run, dict):
        raise ValueError(f"run_result {run!r}")
    stdout, stderr = _text(run, "stdout"), _text(run, "stderr")
    return_code: int | None = None
    status: SandboxStatus = "timeout"
    if run["status"] == "Finished":
        return_code = run["return_code"]
        if not isinstance(return_code, int):
            raise ValueError(f"return_code {return_code!r}")
        status = "killed" if return_code in _KILLED_CODES else "finished"
    elif run["status"] != "TimeLimitExceeded":
        raise ValueError(f"run status {run['status']!r}: {stderr}")
    size = limits.output_bytes
    if max(len(stdout), len(stderr)) > size or answer.get("message") == OUTPUT_LIMIT_MESSAGE:
        status, return_code = "output_limit", None
    seconds = run.get("execution_time")
    return SandboxResult(
        stdout[:size],
        stderr[:size],
        return_code,
        status,
        float(seconds) if isinstance(seconds, int | float) else 0.0,
    )


def _text(run: Mapping[str, object], name: str) -> str:
    text = run.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{name} {text!r}")
    return text
