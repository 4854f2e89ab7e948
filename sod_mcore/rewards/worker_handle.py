"""The parent's end of one grading process (``grading_worker.py``)."""

import asyncio
import contextlib
import json
import os
import struct
import sys
from typing import Any

from sod_mcore.tools import InfrastructureError

FRAME_LENGTH = struct.Struct("!Q")
"""The number of bytes of a frame, which stands before it."""

_LOAD_SECONDS = 120.0
"""To start a process, or to import a grader in it, on a busy machine."""

_LONGEST_REPLY = 1 << 20


class GraderTimeoutError(Exception):
    """The grader did not answer in its time."""


class WorkerHandle:
    """One grading process. It serves one request at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Take over a process; :meth:`start` makes one."""
        self._process = process

    @classmethod
    async def start(cls, memory_bytes: int) -> "WorkerHandle":
        """Start a process and wait until it is ready.

        Raises:
            InfrastructureError: it did not start; it says why on the error stream.
        """
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "sod_mcore.rewards.grading_worker"),
                *(str(os.getpid()), str(memory_bytes)),
                stdin=pipe,
                stdout=pipe,
                env=_environment(),
                limit=_LONGEST_REPLY,
                start_new_session=True,  # Ctrl-C reaches the parent, which closes the pool
            )
        except OSError as error:
            raise InfrastructureError(f"a grading process could not be started: {error}") from error
        worker = cls(process)
        try:
            await worker._read_reply(_LOAD_SECONDS)
        except BaseException as error:
            await worker.kill()
            if isinstance(error, GraderTimeoutError):
                raise InfrastructureError(
                    f"a grading process was not ready after {_LOAD_SECONDS:g} s"
                ) from error
            raise
        return worker

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs, as far as is known."""
        return self._process.returncode is None

    async def ask(self, grader: bytes, arguments: bytes, timeout_seconds: float) -> dict[str, Any]:
        """Grade once; the reply is one field of "verdict", "unusable_row" and "failure".

        After anything but a reply the process must be killed.

        Args:
            grader: the pickled grader.
            arguments: its pickled arguments.
            timeout_seconds: from the moment that the grader is called.

        Raises:
            GraderTimeoutError: the grader took longer.
            InfrastructureError: the process died, or could not load the grader in time.
        """
        stdin = self._process.stdin
        assert stdin is not None
        for frame in (grader, arguments):
            stdin.write(FRAME_LENGTH.pack(len(frame)) + frame)
        try:
            reply = await self._read_reply(_LOAD_SECONDS)
        except GraderTimeoutError as error:
            raise InfrastructureError(
                f"a grading process did not load its grader in {_LOAD_SECONDS:g} s"
            ) from error
        if "is_started" in reply:
            reply = await self._read_reply(timeout_seconds)
        return reply

    async def kill(self) -> None:
        """End the process, whatever it does. May be called again."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def _read_reply(self, timeout_seconds: float) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        try:
            async with asyncio.timeout(timeout_seconds):
                line = await stdout.readline()
        except TimeoutError as error:
            raise GraderTimeoutError from error
        if not line.endswith(b"\n"):
            await self.kill()
            raise InfrastructureError(
                f"a grading process died (exit status {self._process.returncode})"
            )
        reply: dict[str, Any] = json.loads(line)
        return reply


def _environment() -> dict[str, str]:
    """This process's environment, with its import path, so that a user's graders are found."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
