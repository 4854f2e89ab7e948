"""The rollout pool as one process on this machine.

A process of its own (``rollout/worker.py``), so that parsing megabytes of JSON never holds up the
trainer. It is started before ``torch.distributed`` and talks over one pipe. It ends by itself when
the trainer does: the pipe's other end closes.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe

from sod_mcore.rollout.batch import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.rollout.child_environment import single_process_environment
from sod_mcore.rollout.pool import (
    CLOSE_TIMEOUT_SECONDS,
    POLL_SECONDS,
    START_TIMEOUT_SECONDS,
    PoolSettings,
    RolloutError,
    RolloutInterruptedError,
    RolloutPool,
    Ticket,
)


@dataclass(frozen=True)
class PoolReady:
    """First message of the pool process: it has started and reached the engines."""


@dataclass(frozen=True)
class PoolFailure:
    """Last message of a pool process that cannot go on."""

    message: str


@dataclass(frozen=True)
class BatchOrder:
    """A batch to work on."""

    ticket: Ticket
    request: RolloutRequest


@dataclass(frozen=True)
class BatchProgress:
    """How far a batch is."""

    ticket: Ticket
    progress: RolloutProgress


@dataclass(frozen=True)
class BatchDone:
    """A finished batch."""

    ticket: Ticket
    result: RolloutResult


@dataclass(frozen=True)
class GateRequest:
    """Close (pause) or open (resume) the gate through which requests reach the engines."""

    is_open: bool


@dataclass(frozen=True)
class GateReply:
    """The gate is in the state that was asked for; when closed, no request is in flight."""

    is_open: bool


class ProcessPool(RolloutPool):
    """Handle on the pool process."""

    def __init__(self, settings: PoolSettings) -> None:
        """Start the process and wait until it has reached the engines.

        Raises:
            RolloutError: it did not start, with its own words for why.
        """
        self._log_path = settings.run_directory / "rollout_pool.log"
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._tickets = itertools.count()
        self._results: dict[Ticket, RolloutResult] = {}
        self._gate_replies: deque[GateReply] = deque()
        # Whichever of the two processes is killed, the other one removes it.
        self._temporary = tempfile.TemporaryDirectory(
            prefix="rollout_pool_", ignore_cleanup_errors=True
        )
        self._connection, theirs = Pipe()
        worker = [sys.executable, "-m", "sod_mcore.rollout.worker"]
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*worker, str(theirs.fileno()), self._temporary.name],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**single_process_environment(), "TMPDIR": self._temporary.name},
                start_new_session=True,  # Ctrl-C is the trainer's to handle; the pool follows it
            )
        theirs.close()
        self._connection.send(settings)
        self._is_ready = False
        self._wait_until(lambda: self._is_ready, START_TIMEOUT_SECONDS, "start")

    def submit(self, request: RolloutRequest) -> Ticket:
        ticket = next(self._tickets)
        self._send(BatchOrder(ticket, request))
        return ticket

    def collect(
        self,
        ticket: Ticket,
        timeout_seconds: float,
        on_progress: Callable[[RolloutProgress], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> RolloutResult:
        def is_over() -> bool:
            return ticket in self._results or should_stop()

        def hear(message: BatchProgress) -> None:
            if on_progress is not None and message.ticket == ticket:
                on_progress(message.progress)

        self._wait_until(is_over, timeout_seconds, "finish a batch", hear)
        if ticket not in self._results:
            raise RolloutInterruptedError
        return self._results.pop(ticket)

    def pause(self, timeout_seconds: float = 60.0) -> None:
        self._set_gate(False, timeout_seconds)

    def resume(self, timeout_seconds: float = 60.0) -> None:
        self._set_gate(True, timeout_seconds)

    def close(self) -> None:
        """End the process: closing the pipe asks it to, a kill follows if it does not."""
        self._connection.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._temporary.cleanup()

    def _set_gate(self, is_open: bool, timeout_seconds: float) -> None:
        self._send(GateRequest(is_open))
        action = "resume" if is_open else "pause"
        self._wait_until(lambda: bool(self._gate_replies), timeout_seconds, action)
        self._gate_replies.popleft()

    def _send(self, message: BatchOrder | GateRequest) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died() from error

    def _died(self) -> RolloutError:
        code = self._process.wait()
        return RolloutError(
            f"the rollout pool ended with exit code {code}; its log is {self._log_path}"
        )

    def _wait_until(
        self,
        condition: Callable[[], bool],
        timeout_seconds: float,
        action: str,
        on_progress: Callable[[BatchProgress], None] = lambda message: None,
    ) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"the rollout pool did not {action} within {timeout_seconds:.0f} s; "
                    f"its log is {self._log_path}"
                )
            self._receive(on_progress)

    def _receive(self, on_progress: Callable[[BatchProgress], None]) -> None:
        try:
            if not self._connection.poll(POLL_SECONDS):
                return
            message = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error
        if isinstance(message, PoolReady):
            self._is_ready = True
        elif isinstance(message, BatchProgress):
            on_progress(message)
        elif isinstance(message, BatchDone):
            self._results[message.ticket] = message.result
        elif isinstance(message, GateReply):
            self._gate_replies.append(message)
        elif isinstance(message, PoolFailure):
            raise RolloutError(message.message)
