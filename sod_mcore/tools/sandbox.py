"""Runs untrusted Python programs, many at a time, each in a fresh isolated interpreter.

Starting an isolated interpreter takes tens of milliseconds, mostly waiting; a few are therefore
kept warm. Each call takes one, and another is started behind it.
"""

import asyncio
import logging
import os
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from sod_mcore.tools.bubblewrap import (
    MENDS,
    Bubblewrap,
    PythonRuntime,
    find_bubblewrap,
    find_python,
    launch_user,
)
from sod_mcore.tools.interface import InfrastructureError, SandboxUnavailableError
from sod_mcore.tools.interpreter import (
    IsolatedLauncher,
    Launcher,
    ProgramRequest,
    UnisolatedLauncher,
    WarmInterpreter,
    python_arguments,
)
from sod_mcore.tools.limits import SandboxLimits
from sod_mcore.tools.memory_group import MemoryGroup
from sod_mcore.tools.runner import SandboxResult

logger = logging.getLogger(__name__)


class Sandbox:
    """A pool of one-shot isolated Python interpreters.

    Use it as an asynchronous context manager, or call `start` and `close`. All calls belong to one
    event loop; interpreters die with the thread that runs it.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        max_concurrency: int = 16,
        warm_count: int = 4,
        package_paths: Sequence[Path] = (),
        preloaded_modules: Sequence[str] = (),
        python_prefix: Path | None = None,
        bubblewrap_path: Path | None = None,
        allow_unisolated: bool = False,
        memory_group: MemoryGroup | None = None,
    ) -> None:
        """Remember the settings; nothing is started.

        Args:
            limits: what one program may use.
            max_concurrency: programs that run at a time; further calls wait.
            warm_count: idle interpreters kept ready.
            package_paths: directories of Python packages (such as a site-packages) to be visible
                inside; they must suit the Python there.
            preloaded_modules: imported while an interpreter warms up; pays only where interpreters
                wait for calls, since each one is used once.
            python_prefix: installation of the Python to run, readable by every user; by default
                the system's (/usr/bin/python3), or else the one that runs us.
            bubblewrap_path: bwrap to use instead of the pip package's or the system's.
            allow_unisolated: where isolation is impossible, run programs as plain processes under
                resource limits, and warn. They can then read files and use the network.
            memory_group: bounds the memory of all programs together; closed by its owner, after
                this sandbox. A program that it leaves no memory ends as "killed".
        """
        if max_concurrency < 1 or warm_count < 1:
            raise ValueError(
                f"Sandbox: max_concurrency = {max_concurrency}, warm_count = {warm_count}: "
                "give at least 1 of each"
            )
        self.limits = limits or SandboxLimits()
        self.is_isolated = True
        self._warm_count = warm_count
        self._package_paths = [Path(path).absolute() for path in package_paths]
        self._preloaded_modules = preloaded_modules
        self._python = find_python(python_prefix)
        self._bubblewrap_path = bubblewrap_path
        self._allow_unisolated = allow_unisolated
        self._memory_group = memory_group
        self._slots = asyncio.Semaphore(max_concurrency)
        self._warm: deque[asyncio.Task[WarmInterpreter]] = deque()
        self._running: set[WarmInterpreter] = set()
        self._launcher: Launcher | None = None
        self._bubblewrap: Bubblewrap | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    async def start(self) -> None:
        """Find out how to isolate, start one interpreter as a proof, then warm up the others.

        Raises:
            SandboxUnavailableError: isolation is impossible here (and `allow_unisolated` is
                False); the message says what was tried, what it answered and what to change.
        """
        if self._launcher is not None:
            raise RuntimeError("this Sandbox is already started")
        try:
            launcher, first = await self._start_isolated()
        except SandboxUnavailableError as error:
            await self.close()
            if not self._allow_unisolated:
                raise
            logger.warning("programs run WITHOUT isolation (allow_unisolated=True): %s", error)
            self.is_isolated = False
            launcher, first = await self._start_unisolated()
        self._launcher = launcher
        self._warm.append(asyncio.create_task(_already(first)))
        self._refill(self._warm_count)

    async def run(
        self,
        code: str,
        *,
        stdin: str = "",
        print_last_expression: bool = False,
        short_traceback: bool = False,
        wall_seconds: float | None = None,
        memory_bytes: int | None = None,
    ) -> SandboxResult:
        """Run one program and return what it did. A program's failure is a result, not an error.

        Args:
            code: Python source, run as `__main__`; its file name in tracebacks is `<code>`.
            stdin: the program's standard input.
            print_last_expression: print the value of a last expression statement unless it is
                None, as a notebook does.
            short_traceback: print only the message of an uncaught exception.
            wall_seconds: a lower limit for this program than that of the sandbox.
            memory_bytes: likewise.

        Raises:
            InfrastructureError: no interpreter could be started, or it broke before the program
                began. The call may be repeated.
        """
        limits = self.limits.lowered(wall_seconds=wall_seconds, memory_bytes=memory_bytes)
        request = ProgramRequest(
            code, limits.memory_bytes, stdin, print_last_expression, short_traceback
        )
        async with self._slots:
            interpreter = await self._take()
            self._running.add(interpreter)
            try:
                result = await interpreter.execute(request, limits.wall_seconds)
            finally:
                self._running.discard(interpreter)
                self._refill(self._warm_count)
            if self._launcher is None:
                raise InfrastructureError("the sandbox was closed while a program ran")
            return result

    async def close(self) -> None:
        """Kill everything, running programs included, and reap it. May be called twice."""
        self._launcher = None
        launches = list(self._warm)
        self._warm.clear()
        # Waited for, not cancelled: a half-started bwrap could leave a zombie behind.
        ended = await asyncio.gather(*launches, return_exceptions=True)
        idle = [outcome for outcome in ended if isinstance(outcome, WarmInterpreter)]
        await asyncio.gather(*(interpreter.destroy() for interpreter in idle))
        running = list(self._running)
        for interpreter in running:
            interpreter.kill()
        await asyncio.gather(*(interpreter.ended.wait() for interpreter in running))
        if self._bubblewrap is not None:
            self._bubblewrap.release()
        if self._directory is not None:
            self._directory.cleanup()

    async def __aenter__(self) -> "Sandbox":
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _take(self) -> WarmInterpreter:
        """The oldest living warm interpreter.

        It is replaced when its program has ended, so that the start of another does not slow the
        program down; at once only if none is left for the next call.
        """
        for _ in range(self._warm_count + 1):
            if self._launcher is None:
                raise InfrastructureError("the sandbox is not started, or was closed")
            self._refill(1)
            launch = self._warm.popleft()
            self._refill(1)
            try:
                interpreter = await asyncio.shield(launch)
            except asyncio.CancelledError:
                self._warm.appendleft(launch)  # the caller gave up, the interpreter is good
                raise
            if interpreter.alive:
                return interpreter
            await interpreter.destroy()
        raise InfrastructureError("idle sandboxed interpreters keep ending by themselves")

    def _refill(self, count: int) -> None:
        """Start interpreters until `count` are warm or on their way."""
        while self._launcher is not None and len(self._warm) < count:
            launch = self._launch(self._launcher)
            self._warm.append(asyncio.create_task(launch))

    async def _launch(self, launcher: Launcher) -> WarmInterpreter:
        return await WarmInterpreter.launch(launcher, self.limits, self._memory_group)

    async def _start_isolated(self) -> tuple[Launcher, WarmInterpreter]:
        executable = find_bubblewrap(self._bubblewrap_path)
        bubblewrap = Bubblewrap(executable, self.limits, self._python, self._package_paths)
        self._bubblewrap = bubblewrap
        bubblewrap.prepare()
        launcher = IsolatedLauncher(
            bubblewrap,
            python_arguments(
                self.limits, bubblewrap.visible_package_paths(), self._preloaded_modules
            ),
        )
        try:
            return launcher, await self._launch(launcher)
        except InfrastructureError as error:
            raise SandboxUnavailableError(
                f"programs cannot be isolated on this machine. Tried {executable} "
                f"as user {launch_user() or os.geteuid()} with Python "
                f"{_outside_path(self._python)}; it answered:\n  {error}\n{MENDS}"
            ) from error

    async def _start_unisolated(self) -> tuple[Launcher, WarmInterpreter]:
        self._directory = tempfile.TemporaryDirectory(prefix="unisolated-")
        Path(self._directory.name).chmod(0o1777)
        package_paths = [str(path) for path in self._package_paths]
        launcher = UnisolatedLauncher(
            _outside_path(self._python),
            python_arguments(self.limits, package_paths, self._preloaded_modules),
            self._directory.name,
        )
        return launcher, await self._launch(launcher)


def _outside_path(python: PythonRuntime) -> str:
    if python.prefix is None:
        return python.executable
    return str(python.prefix / "bin" / Path(python.executable).name)


async def _already(interpreter: WarmInterpreter) -> WarmInterpreter:
    return interpreter
