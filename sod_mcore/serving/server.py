"""One engine or router: started on a port of its own, and started again there when it dies.

An engine that lives but answers no more counts as dead. It is asked for ``/server_info``: SGLang
0.5.23 passes that through the scheduler, which answers between two batches, and also while it is
paused for new weights. ``/health`` would not do: a paused engine answers it with 503 after 20 s, as
one does whose scheduler hangs.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from sod_mcore.config import ServingConfig
from sod_mcore.serving import launch
from sod_mcore.serving.children import Child, Children
from sod_mcore.serving.fleet import FleetError
from sod_mcore.serving.fleet_state import Condition, FleetStateFile, Role
from sod_mcore.serving.restarts import RestartBudget

START_ATTEMPTS = 3
"""First starts of one process whose port was taken by somebody else in the meantime."""
POLL_SECONDS = 0.5
PORT_LOST = re.compile(r"address already in use|port is already in use", re.IGNORECASE)
READY_PATHS: Mapping[Role, str] = {"engine": "/health", "router": "/readiness"}
SIGN_OF_LIFE = "/server_info"
QUESTIONS = 4
"""Questions in a row that a dead engine leaves unanswered, in serving.health_timeout_seconds
together. More than one, so that it is not the engine's fault when this process stood still."""
ASK_EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class ServerSpec:
    """What to run.

    Attributes:
        name: what people call it, such as "student_engine_1".
        model: the model that it serves.
        role: "engine" or "router".
        command: the command line for a port.
        environment: None for ours.
        log_path: receives its output.
    """

    name: str
    model: str
    role: Role
    command: Callable[[int], list[str]]
    environment: Mapping[str, str] | None
    log_path: Path


class Server:
    """A process that is kept alive.

    Args:
        spec: what to run.
        serving: where, and how patiently.
        children: starts it, and ends it with us.
        states: is told of every change.
        say: receives a line at a death and when it is over.
    """

    def __init__(
        self,
        spec: ServerSpec,
        serving: ServingConfig,
        children: Children,
        states: FleetStateFile,
        say: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self.url = ""
        self._serving = serving
        self._children = children
        self._states = states
        self._say = say
        self._budget = RestartBudget(serving.max_restarts, serving.restart_window_seconds)
        self._restarts = 0
        self._port = 0
        self._command: list[str] = []
        self._child: Child | None = None

    async def start(self) -> str:
        """Start it on a free port, again if the port is lost; returns its base URL when ready.

        Raises:
            FleetError: it cannot be started, or died.
        """
        for attempt in range(1, START_ATTEMPTS + 1):
            self._port = launch.free_port(self._serving.host)
            self._command = self.spec.command(self._port)
            self.url = f"http://{self._serving.host}:{self._port}"
            self._record("starting")
            child = self._start_process()
            if await until_ready(self.url + READY_PATHS[self.spec.role], child):
                self._record("ready")
                return self.url
            if attempt == START_ATTEMPTS or not PORT_LOST.search(child.log_tail(lines=100)):
                raise FleetError(f"{self.spec.name} {_end(child)}; {_last_lines(child)}")
            self._say(f"{self.spec.name}: port {self._port} was taken; starting again on another")
            await asyncio.to_thread(self._children.kill, child)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def keep(self) -> None:
        """Start it again whenever it dies; never returns.

        Raises:
            FleetError: it died too often.
        """
        while True:
            cause: str | None = await self._until_dead()
            began = asyncio.get_running_loop().time()
            while cause is not None:
                cause = await self._restart(cause)
            self._record("ready")
            seconds = asyncio.get_running_loop().time() - began
            self._say(f"{self.spec.name}: ready again after {seconds:.0f} s")

    async def _until_dead(self) -> str:
        """Wait for its end, or for its silence; returns what happened."""
        silence = asyncio.create_task(self._until_silent())
        try:
            while self._running_child.exit_code is None:
                if silence.done():
                    silence.result()  # raises what ended it otherwise
                    seconds = self._serving.health_timeout_seconds
                    return f"did not answer for {seconds:g} s (serving.health_timeout_seconds)"
                await asyncio.sleep(POLL_SECONDS)
            return _end(self._running_child)
        finally:
            silence.cancel()

    async def _until_silent(self) -> None:
        """Return when an engine has left several questions in a row unanswered."""
        if self.spec.role != "engine":
            await asyncio.Event().wait()
        loop = asyncio.get_running_loop()
        patience = self._serving.health_timeout_seconds / QUESTIONS
        unanswered = 0
        async with aiohttp.ClientSession() as session:
            while unanswered < QUESTIONS:
                asked = loop.time()
                status = await answer_status(session, self.url + SIGN_OF_LIFE, patience)
                unanswered = 0 if status is not None else unanswered + 1
                pause = patience if status is None else min(patience, ASK_EVERY_SECONDS)
                await asyncio.sleep(asked + pause - loop.time())

    async def _restart(self, cause: str) -> str | None:
        """Start it again; returns None when it is ready, else why it is not.

        Raises:
            FleetError: it died too often, or cannot be ended.
        """
        self._record("restarting")  # first: ending what is left of it may take a while
        name, child = self.spec.name, self._running_child
        lines = _last_lines(child)
        if not await asyncio.to_thread(self._children.kill, child):
            raise FleetError(f"{name} {cause}, and its processes do not end; {lines}")
        most, window = self._serving.max_restarts, self._serving.restart_window_seconds
        pause = self._budget.take(asyncio.get_running_loop().time())
        if pause is None:
            self._record("given up")
            tries = f" after {most} restarts in {window:g} s (serving.max_restarts)" if most else ""
            raise FleetError(f"{name} {cause}{tries}; {lines}")
        self._say(f"{name} {cause}; it is started again in {pause:g} s; {lines}")
        await asyncio.sleep(pause)
        return await self._start_again()

    async def _start_again(self) -> str | None:
        timeout = self._serving.start_timeout_seconds
        try:
            async with asyncio.timeout(timeout):
                await self._until_port_is_free()
                self._restarts += 1
                child = self._start_process()
                self._record("restarting")
                is_ready = await until_ready(self.url + READY_PATHS[self.spec.role], child)
        except TimeoutError:
            return f"was not ready within serving.start_timeout_seconds={timeout:g}"
        return None if is_ready else _end(child)

    async def _until_port_is_free(self) -> None:
        """Another program may have got the port meanwhile; the addresses must stay true."""
        if launch.is_free_port(self._serving.host, self._port):
            return
        self._say(f"{self.spec.name}: another program has port {self._port}; waiting for its end")
        while not launch.is_free_port(self._serving.host, self._port):
            await asyncio.sleep(POLL_SECONDS)

    def _start_process(self) -> Child:
        try:
            self._child = self._children.start(
                self.spec.name,
                self._command,
                environment=self.spec.environment,
                log_path=self.spec.log_path,
            )
        except OSError as error:
            raise FleetError(
                f"serving.python is {self._serving.python!r}, which cannot be started: {error}"
            ) from error
        return self._child

    @property
    def _running_child(self) -> Child:
        assert self._child is not None, "start() comes first"
        return self._child

    def _record(self, state: Condition) -> None:
        spec = self.spec
        self._states.record(spec.name, spec.model, spec.role, self.url, state, self._restarts)


async def until_ready(url: str, child: Child | None = None) -> bool:
    """Wait until ``url`` answers 200; False if ``child`` ends before."""
    async with aiohttp.ClientSession() as session:
        while child is None or child.exit_code is None:
            if await answer_status(session, url, 30.0) == 200:
                return True
            await asyncio.sleep(POLL_SECONDS)
    return False


async def answer_status(session: aiohttp.ClientSession, url: str, seconds: float) -> int | None:
    """The HTTP status of a GET, or None if there is no answer within ``seconds``."""
    timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=2)
    try:
        async with session.get(url, timeout=timeout) as response:
            return response.status
    except (aiohttp.ClientError, TimeoutError, ConnectionError):
        return None


def _end(child: Child) -> str:
    return f"ended with exit code {child.exit_code}"


def _last_lines(child: Child) -> str:
    return f"the last lines of {child.log_path}:\n{child.log_tail()}"
