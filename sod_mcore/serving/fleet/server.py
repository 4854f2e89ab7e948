"""One engine or router: started, and started again when it dies.

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
from urllib.parse import urlsplit

import aiohttp

from sod_mcore.config import ServingConfig
from sod_mcore.serving.endpoints import FleetError
from sod_mcore.serving.fleet.places import POLL_SECONDS, NotStartedError, Place, Running
from sod_mcore.serving.fleet.restarts import RestartBudget
from sod_mcore.serving.fleet.sleep_file import read_sleep
from sod_mcore.serving.fleet.state import Condition, FleetStateFile, Role

START_ATTEMPTS = 3
"""First starts of one process whose port was taken by somebody else in the meantime."""
PORT_LOST = re.compile(r"address already in use|port is already in use", re.IGNORECASE)
ADDRESS_LOST = "address already in use"
"""The end of what a server says that cannot listen."""
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
        place: starts its processes.
        log_path: has their output.
        visible_gpus: CUDA_VISIBLE_DEVICES of an engine; None where it is not known, or all are.
    """

    name: str
    model: str
    role: Role
    place: Place
    log_path: Path
    visible_gpus: str | None = None


class Server:
    """A process that is kept alive.

    Args:
        spec: what to run.
        serving: how patiently.
        states: is told of every change.
        say: receives a line at a death and when it is over.
        on_move: called when it has another address than before, and answers there.
        sleeps_in: the folder where a trainer tells that the engines are asleep
            (``serving.placement: colocated``); None where they never are.
    """

    def __init__(
        self,
        spec: ServerSpec,
        serving: ServingConfig,
        states: FleetStateFile,
        say: Callable[[str], None],
        on_move: Callable[[Server], None] = lambda server: None,
        sleeps_in: Path | None = None,
    ) -> None:
        self.spec = spec
        self.url = ""
        self._serving = serving
        self._states = states
        self._say = say
        self._on_move = on_move
        self._sleeps_in = sleeps_in
        self._budget = RestartBudget(serving.max_restarts, serving.restart_window_seconds)
        self._restarts = 0
        self._process: Running | None = None
        self._renewal: str | None = None

    async def start(self) -> str:
        """Start it on a free port, again if the port is lost; returns its base URL when ready.

        Raises:
            FleetError: it cannot be started, or died.
        """
        for attempt in range(1, START_ATTEMPTS + 1):
            self._record("starting")
            try:
                process = await self._start_process(anew=True)
            except NotStartedError as error:
                raise FleetError(f"{self.spec.name} {error}") from error
            self._record("starting")
            if await until_ready(self.url + READY_PATHS[self.spec.role], process):
                self._record("ready")
                return self.url
            if attempt == START_ATTEMPTS or not has_lost_port(process):
                raise FleetError(f"{self.spec.name} {_why(process)}; {self._last_lines(process)}")
            self._say(f"{self.spec.name}: {self.url} was taken; starting again on another port")
            await process.kill()
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def keep(self) -> None:
        """Start it again whenever it dies; never returns.

        Raises:
            FleetError: it died too often.
        """
        while True:
            cause: str | None = await self._until_dead()
            began, url_before = asyncio.get_running_loop().time(), self.url
            while cause is not None:
                cause = await self._restart(cause)
            if self.url != url_before:
                self._on_move(self)
            self._record("ready")
            seconds = asyncio.get_running_loop().time() - began
            where = f" at {self.url}" if self.url != url_before else ""
            self._say(f"{self.spec.name}: ready again{where} after {seconds:.0f} s")

    def renew(self, reason: str) -> None:
        """Let :meth:`keep` start it again, with the command line that it has now.

        That counts as no death.
        """
        self._renewal = reason

    async def _until_dead(self) -> str:
        """Wait for its end, or for its silence; returns what happened."""
        silence = asyncio.create_task(self._until_silent())
        try:
            while self._running.end is None:
                if self._renewal is not None:
                    return self._renewal
                if silence.done():
                    silence.result()  # raises what ended it otherwise
                    seconds = self._serving.health_timeout_seconds
                    return f"did not answer for {seconds:g} s (serving.health_timeout_seconds)"
                if self._is_left_asleep():
                    return "was left asleep by a trainer that has ended"
                await asyncio.sleep(POLL_SECONDS)
            return str(self._running.end)
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
        name, process = self.spec.name, self._running
        lines = self._last_lines(process)
        if not await process.kill():
            raise FleetError(f"{name} {cause}, and its processes do not end; {lines}")
        most, window = self._serving.max_restarts, self._serving.restart_window_seconds
        pause: float | None = 0.0
        if self._renewal is None:
            pause = self._budget.take(asyncio.get_running_loop().time())
        if pause is None:
            self._record("given up")
            tries = f" after {most} restarts in {window:g} s (serving.max_restarts)" if most else ""
            raise FleetError(f"{name} {cause}{tries}; {lines}")
        self._say(f"{name} {cause}; it is started again in {pause:g} s; {lines}")
        await asyncio.sleep(pause)
        await self._until_memory_is_free()
        return await self._start_again()

    def _is_left_asleep(self) -> bool:
        record = read_sleep(self._sleeps_in) if self._sleeps_in is not None else None
        if record is None or not record.is_orphaned:
            return False
        return record.engines.get(self.url) == self._restarts + 1

    async def _until_memory_is_free(self) -> None:
        """Wait while a trainer works on the engines' GPUs: this one would come up awake."""
        if self._sleeps_in is None or self.spec.role != "engine":
            return
        while (record := read_sleep(self._sleeps_in)) and record.is_training:
            if record.is_orphaned:
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _start_again(self) -> str | None:
        timeout = self._serving.start_timeout_seconds
        try:
            async with asyncio.timeout(timeout):
                self._renewal = None  # this start has the command line that it asks for
                process = await self._start_process(anew=False)
                self._restarts += 1
                self._record("restarting")
                is_ready = await until_ready(self.url + READY_PATHS[self.spec.role], process)
        except NotStartedError as error:
            return str(error)
        except TimeoutError:
            return f"was not ready within serving.start_timeout_seconds={timeout:g}"
        return None if is_ready else _why(process)

    async def _start_process(self, *, anew: bool) -> Running:
        self._process = await self.spec.place.start(anew=anew)
        self.url = self._process.url
        return self._process

    @property
    def _running(self) -> Running:
        assert self._process is not None, "start() comes first"
        return self._process

    def _last_lines(self, process: Running) -> str:
        return f"the last lines of {self.spec.log_path}:\n{process.log_tail()}"

    def _record(self, state: Condition) -> None:
        spec = self.spec
        process = (spec.name, spec.model, spec.role, self.url)
        self._states.record(*process, state, self._restarts, visible_gpus=spec.visible_gpus)


def has_lost_port(process: Running) -> bool:
    """Whether somebody else had the port when the process wanted it.

    An engine need not end then: the warm-up of SGLang 0.5.23 waits for an answer of whoever has it.
    While it lives, only an error about its own port counts: it may have found another one for what
    it does inside.
    """
    lines = process.log_tail(lines=100).splitlines()
    if process.end is not None:
        return any(PORT_LOST.search(line) for line in lines)
    port = re.compile(rf"\b{urlsplit(process.url).port}\b")
    return any(ADDRESS_LOST in line and port.search(line) for line in lines)


def _why(process: Running) -> str:
    """Why a process was not ready."""
    return process.end or "found its port taken"


async def until_ready(url: str, process: Running | None = None) -> bool:
    """Wait until ``url`` answers 200; False if ``process`` ends before, or has lost its port."""
    async with aiohttp.ClientSession() as session:
        while process is None or not (process.end or has_lost_port(process)):
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
