"""One interpreter process: started warm, used for one program, killed with all its children.

An interpreter is never used twice, so nothing that a program does can reach the next one.
"""

import asyncio
import contextlib
import json
import marshal
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sod_mcore.tools.bubblewrap import ENVIRONMENT, Bubblewrap, launch_user
from sod_mcore.tools.interface import InfrastructureError
from sod_mcore.tools.limits import SandboxLimits
from sod_mcore.tools.memory_group import MemoryGroup
from sod_mcore.tools.runner import SandboxResult, SandboxStatus
from sod_mcore.tools.seccomp import build_filter

_READY = b"R"
_STARTED = b"S"
_CHUNK_BYTES = 65536
_KILL_SECONDS = 10.0
_KILLED_CODES = (128 + signal.SIGKILL, -signal.SIGKILL)


@dataclass(frozen=True)
class ProgramRequest:
    """One program, as `sandbox_bootstrap.py` reads it. Memory may be less than the limit."""

    code: str
    memory_bytes: int
    stdin: str = ""
    print_last_expression: bool = False
    short_traceback: bool = False


def bootstrap_source() -> str:
    """The text of `sandbox_bootstrap.py`, which only defines functions."""
    return Path(__file__).with_name("sandbox_bootstrap.py").read_text(encoding="utf-8")


def python_arguments(
    limits: SandboxLimits, package_paths: Sequence[str], preloaded_modules: Sequence[str]
) -> list[str]:
    """Arguments that make a Python run the bootstrap."""
    settings = {
        "limits": asdict(limits),
        "package_paths": list(package_paths),
        "preloaded_modules": list(preloaded_modules),
    }
    options = ["-I", "-S", "-B", "-X", "utf8"]
    return [*options, "-c", bootstrap_source() + "\nmain()\n", _as_marshal(settings).hex()]


def _as_marshal(value: dict[str, Any]) -> bytes:
    """Plain values in version 2 of the format, which every Python 3 reads without an import."""
    return marshal.dumps(value, 2)


@dataclass(frozen=True)
class IsolatedLauncher:
    """Starts interpreters under bubblewrap."""

    bubblewrap: Bubblewrap
    arguments: Sequence[str]

    async def start(self) -> tuple[asyncio.subprocess.Process, int | None]:
        """The bwrap process, and a descriptor that its program's pid is read from."""
        info_read, info_write = os.pipe()
        os.set_blocking(info_read, False)
        filter_fd = os.memfd_create("seccomp-filter", os.MFD_CLOEXEC)
        try:
            os.write(filter_fd, build_filter())
            os.lseek(filter_fd, 0, os.SEEK_SET)
            command = self.bubblewrap.command(self.arguments, filter_fd, info_write)
            process = await _spawn(command, {}, "/", pass_fds=(filter_fd, info_write))
        except BaseException:
            os.close(info_read)
            raise
        finally:
            os.close(info_write)
            os.close(filter_fd)
        return process, info_read


@dataclass(frozen=True)
class UnisolatedLauncher:
    """Starts interpreters as plain processes. Their programs can read whatever the user can."""

    executable: str
    arguments: Sequence[str]
    directory: str

    async def start(self) -> tuple[asyncio.subprocess.Process, int | None]:
        """The interpreter process itself; there is no pid to be told."""
        command = [self.executable, *self.arguments]
        return await _spawn(command, ENVIRONMENT, self.directory, pass_fds=()), None


SETPRIV = "/usr/bin/setpriv"
"""Part of util-linux, which every Linux system has."""

Launcher = IsolatedLauncher | UnisolatedLauncher


async def _spawn(
    command: Sequence[str], environment: dict[str, str], directory: str, pass_fds: tuple[int, ...]
) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *_as_launch_user(command),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=environment,
        cwd=directory,
        pass_fds=pass_fds,
        start_new_session=True,
    )


def _as_launch_user(command: Sequence[str]) -> list[str]:
    """The command under the unprivileged user, if this process is privileged.

    By setpriv and not by Popen's `user`, which forks instead of calling vfork: in a process of a
    few hundred megabytes that made a call five times as slow (60 ms instead of 12).
    """
    user = launch_user()
    if user is None:
        return list(command)
    return [SETPRIV, f"--reuid={user}", f"--regid={user}", "--clear-groups", "--", *command]


class WarmInterpreter:
    """An interpreter that waits for its one program. Made by `launch`."""

    def __init__(self, process: asyncio.subprocess.Process, limits: SandboxLimits) -> None:
        self._process = process
        self._limits = limits
        self._program_pidfd: int | None = None
        self._exceeded_output = False
        self.ended = asyncio.Event()

    @classmethod
    async def launch(
        cls, launcher: Launcher, limits: SandboxLimits, memory_group: MemoryGroup | None = None
    ) -> "WarmInterpreter":
        """Start an interpreter, wait until it is ready and put it into the group, if any.

        Raises:
            InfrastructureError: it did not start within `limits.startup_seconds`; the message
                holds what it wrote to standard error.
        """
        try:
            process, info_fd = await launcher.start()
        except OSError as error:
            raise InfrastructureError(f"could not launch a sandbox: {error}") from error
        interpreter = cls(process, limits)
        try:
            async with asyncio.timeout(limits.startup_seconds):
                await interpreter._expect(_READY)
            pid = interpreter._learn_program_pid(info_fd)
            if memory_group is not None:
                memory_group.add(pid)
        except BaseException as error:
            # bwrap may have told the pid all the same, and only then can it reap the program.
            if interpreter._program_pidfd is None:
                with contextlib.suppress(BlockingIOError, ValueError, ProcessLookupError):
                    interpreter._learn_program_pid(info_fd)
            await interpreter.destroy()
            if isinstance(error, TimeoutError):
                text = f"a sandbox was not ready after {limits.startup_seconds} s"
                raise InfrastructureError(text) from error
            if isinstance(error, OSError):
                raise InfrastructureError(f"a sandbox ended while starting: {error}") from error
            raise
        finally:
            if info_fd is not None:
                os.close(info_fd)
        return interpreter

    @property
    def alive(self) -> bool:
        """False once the process has ended, for whatever reason."""
        return self._process.returncode is None

    async def execute(self, request: ProgramRequest, wall_seconds: float) -> SandboxResult:
        """Run the program for at most this long and end the interpreter.

        Raises:
            InfrastructureError: the interpreter ended before the program started, or bubblewrap was
                killed while it ran.
        """
        try:
            await self._deliver(request)
            result = await self._watch(wall_seconds)
            self._refuse_loss_of_bubblewrap(result)
            return result
        finally:
            await self.destroy()

    def kill(self) -> None:
        """Kill the program with all its children. `execute` then returns soon."""
        with contextlib.suppress(ProcessLookupError):
            if self._program_pidfd is not None:
                signal.pidfd_send_signal(self._program_pidfd, signal.SIGKILL)
            elif not self.ended.is_set():
                # bwrap before it told its program's pid, or an unisolated program's whole group,
                # which may outlive the process that leads it.
                os.killpg(self._process.pid, signal.SIGKILL)

    async def destroy(self) -> None:
        """Kill the interpreter with all its children and reap it. To be called once."""
        self.kill()
        stdin, stdout, stderr = self._streams()
        stdin.close()
        try:
            async with asyncio.timeout(_KILL_SECONDS):
                # A pipe that holds unread output would stay open.
                await asyncio.gather(_discard(stdout), _discard(stderr), self._process.wait())
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        finally:
            if self._program_pidfd is not None:
                os.close(self._program_pidfd)
                self._program_pidfd = None
            self.ended.set()

    async def _deliver(self, request: ProgramRequest) -> None:
        stdin = self._streams()[0]
        try:
            async with asyncio.timeout(self._limits.startup_seconds):
                stdin.write(_as_marshal(asdict(request)))
                await stdin.drain()
                stdin.close()
                await self._expect(_STARTED)
        except (TimeoutError, ConnectionError) as error:
            raise InfrastructureError(f"a sandbox did not take its program: {error!r}") from error

    async def _watch(self, wall_seconds: float) -> SandboxResult:
        _, stdout, stderr = self._streams()
        output, errors = bytearray(), bytearray()
        status: SandboxStatus = "finished"
        return_code: int | None = None
        started = time.monotonic()
        try:
            async with asyncio.timeout(wall_seconds):
                await asyncio.gather(self._collect(stdout, output), self._collect(stderr, errors))
                return_code = await self._process.wait()
        except TimeoutError:
            status = "timeout"
        if self._exceeded_output:
            status, return_code = "output_limit", None
        elif return_code in _KILLED_CODES:
            status = "killed"
        return SandboxResult(
            stdout=output.decode("utf-8", "replace"),
            stderr=errors.decode("utf-8", "replace"),
            return_code=return_code,
            status=status,
            wall_seconds=time.monotonic() - started,
        )

    def _refuse_loss_of_bubblewrap(self, result: SandboxResult) -> None:
        """What ends the program is told by bubblewrap as 128 + signal. A signal that ends
        bubblewrap itself, which no program can reach, says nothing about the program."""
        code, is_isolated = result.return_code, self._program_pidfd is not None
        if is_isolated and code is not None and code < 0:
            raise InfrastructureError(
                f"bubblewrap was ended by {signal.Signals(-code).name} while a program ran"
            )

    async def _collect(self, stream: asyncio.StreamReader, into: bytearray) -> None:
        """Read to the end; above the limit kill the program, which brings the end."""
        while chunk := await stream.read(_CHUNK_BYTES):
            room = self._limits.output_bytes - len(into)
            into += chunk[:room]
            if len(chunk) > room:
                self._exceeded_output = True
                self.kill()

    async def _expect(self, signal_byte: bytes) -> None:
        _, stdout, stderr = self._streams()
        if await stdout.read(1) == signal_byte:
            return
        text = (await stderr.read(_CHUNK_BYTES)).decode("utf-8", "replace").strip()
        raise InfrastructureError(f"a sandboxed interpreter ended early: {text or 'no message'}")

    def _learn_program_pid(self, info_fd: int | None) -> int:
        """Hold on to the program itself. If it is killed, bwrap reaps it and ends; if bwrap were
        killed, the program would die too, but as a zombie that nobody reaps."""
        if info_fd is None:
            return self._process.pid
        # bwrap writes this before the program starts, and the program has already written "R".
        pid = json.loads(os.read(info_fd, _CHUNK_BYTES))["child-pid"]
        self._program_pidfd = os.pidfd_open(pid)
        # Best effort: when the machine runs out of memory, programs go before trainers.
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="ascii")
        return int(pid)

    def _streams(
        self,
    ) -> tuple[asyncio.StreamWriter, asyncio.StreamReader, asyncio.StreamReader]:
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        return stdin, stdout, stderr


async def _discard(stream: asyncio.StreamReader) -> None:
    while await stream.read(_CHUNK_BYTES):
        pass
