"""The parent's end of one grading process (``grading_worker.py``)."""

import asyncio
import contextlib
import json
import os
import signal
import struct
import sys
from typing import Any

from sod_mcore.tools import InfrastructureError

FRAME_LENGTH = struct.Struct("!Q")
"""The number of bytes of a frame, which stands before it."""

_LOAD_SECONDS = 120.0
"""To start a process, or to import a grader in it, on a busy machine."""

_WALL_TIME_FACTOR = 6.0
"""Wall time of one grading by its CPU time: for machines that many processes share, and an end for
a grader that sleeps."""

_GRACE_SECONDS = 1.0
"""To read a reply that is there already: an event loop that was busy may see the end of the time
before it."""

LONGEST_REPLY = 1 << 20
"""Bytes of a line."""


class GraderTimeoutError(Exception):
    """The grader did not answer in its time."""


class _NoReplyError(Exception):
    """The process wrote nothing in its time."""


class WorkerHandle:
    """One grading process. It serves one request at a time."""

    def __init__(self, process: asyncio.subprocess.Process, cpu_seconds: float) -> None:
        """Take over a process; :meth:`start` makes one."""
        self._process = process
        self._cpu_seconds = cpu_seconds

    @classmethod
    async def start(cls, memory_bytes: int, cpu_seconds: float) -> "WorkerHandle":
        """Start a process and wait until it is ready.

        Args:
            memory_bytes: its address space.
            cpu_seconds: CPU time of one grading.

        Raises:
            InfrastructureError: it did not start; it says why on the error stream.
        """
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "sod_mcore.rewards.grading_worker"),
                *(str(os.getpid()), str(memory_bytes), str(cpu_seconds)),
                stdin=pipe,
                stdout=pipe,
                env=_environment(),
                limit=LONGEST_REPLY,
                start_new_session=True,  # Ctrl-C reaches the parent, which closes the pool
            )
        except OSError as error:
            raise InfrastructureError(f"a grading process could not be started: {error}") from error
        worker = cls(process, cpu_seconds)
        try:
            await worker._read_reply(_LOAD_SECONDS)
        except BaseException as error:
            await worker.kill()
            if isinstance(error, _NoReplyError):
                raise InfrastructureError(
                    f"a grading process was not ready after {_LOAD_SECONDS:g} s"
                ) from error
            raise
        return worker

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs, as far as is known."""
        return self._process.returncode is None

    async def ask(self, grader: bytes, arguments: bytes) -> dict[str, Any]:
        """Grade once; the reply is one field of "verdict", "unusable_row" and "failure".

        After anything but a reply the process must be killed.

        Args:
            grader: the pickled grader.
            arguments: its pickled arguments.

        Raises:
            GraderTimeoutError: the grader took more than its CPU time, or six times that by the
                clock, both from the moment that it is called.
            InfrastructureError: the process died, or could not load the grader in time.
        """
        stdin = self._process.stdin
        assert stdin is not None
        for frame in (grader, arguments):
            stdin.write(FRAME_LENGTH.pack(len(frame)) + frame)
        try:
            reply = await self._read_reply(_LOAD_SECONDS)
        except _NoReplyError as error:
            raise InfrastructureError(
                f"a grading process did not load its grader in {_LOAD_SECONDS:g} s"
            ) from error
        if "is_started" in reply:
            try:
                reply = await self._read_reply(_WALL_TIME_FACTOR * self._cpu_seconds)
            except _NoReplyError as error:
                raise GraderTimeoutError from error
        return reply

    async def kill(self) -> None:
        """End the process, whatever it does. May be called again."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def _read_reply(self, timeout_seconds: float) -> dict[str, Any]:
        line = await self._read_line(timeout_seconds)
        if not line.endswith(b"\n"):
            await self._wait_for_end()
            if self._process.returncode == -signal.SIGPROF:  # its CPU time is over
                raise GraderTimeoutError
            raise InfrastructureError(
                f"a grading process died (exit status {self._process.returncode})"
            )
        reply: dict[str, Any] = json.loads(line)
        return reply

    async def _wait_for_end(self) -> None:
        """Learn the exit status of a process that has closed its output, killed only if it lives.

        Sending a signal first would poll the process, and asyncio then reports status 255 for what
        it did not reap itself (Python 3.11).
        """
        try:
            async with asyncio.timeout(_GRACE_SECONDS):
                await self._process.wait()
        except TimeoutError:
            await self.kill()

    async def _read_line(self, timeout_seconds: float) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        reading = asyncio.ensure_future(stdout.readline())
        try:
            for seconds in (timeout_seconds, _GRACE_SECONDS):
                if (await asyncio.wait([reading], timeout=seconds))[0]:
                    return reading.result()
        finally:
            reading.cancel()
        raise _NoReplyError


def _environment() -> dict[str, str]:
    """This process's environment, with its import path, so that a user's graders are found."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
