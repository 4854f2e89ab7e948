"""The rollout pool as one process on this machine.

A process of its own (``rollout/worker.py``), so that parsing megabytes of JSON never holds up the
trainer. It is started before ``torch.distributed`` and talks over one pipe. A thread reads the pipe
all the time: the pool would stand still if it had something to say while the trainer is busy. It
ends by itself when the trainer does: the pipe's other end closes.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from sod_mcore.rollout.child_environment import single_process_environment
from sod_mcore.rollout.pool import (
    CLOSE_TIMEOUT_SECONDS,
    POLL_SECONDS,
    START_TIMEOUT_SECONDS,
    PoolSettings,
    RolloutError,
    RolloutInterruptedError,
    RolloutPool,
    SpanListener,
    Ticket,
)
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.serving.client.counters import ClientCounters
from sod_mcore.timeline import Spans


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
class BatchCancel:
    """A batch that nobody waits for any more."""

    ticket: Ticket


@dataclass(frozen=True)
class BatchProgress:
    """How far a batch is, and what was done when since the last message of this kind."""

    ticket: Ticket
    progress: RolloutProgress
    spans: Spans


@dataclass(frozen=True)
class BatchDone:
    """A finished batch, and what happened to all requests to the engines so far, by model."""

    ticket: Ticket
    result: RolloutResult
    counters: Mapping[str, ClientCounters]


@dataclass(frozen=True)
class BatchFailed:
    """A batch that cannot be played, in words for the user; the others go on."""

    ticket: Ticket
    message: str


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

    def __init__(self, settings: PoolSettings, on_spans: SpanListener = lambda spans: None) -> None:
        """Start the process and wait until it has reached the engines.

        Args:
            on_spans: hears what was done when, while batches run and when they are done.

        Raises:
            RolloutError: it did not start, with its own words for why.
        """
        self._on_spans = on_spans
        self._log_path = settings.run_directory / "rollout_pool.log"
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._tickets = itertools.count()
        self._results: dict[Ticket, RolloutResult | BatchFailed] = {}
        self._cancelled: set[Ticket] = set()
        self._counters: Mapping[str, ClientCounters] = {}
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
        self._inbox = _Inbox(self._connection)
        self._connection.send(settings)
        self._is_ready = False
        self._wait_until(lambda: self._is_ready, START_TIMEOUT_SECONDS, "start")

    @property
    def counters(self) -> Mapping[str, ClientCounters]:
        """Of all requests until the last batch was done."""
        return self._counters

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
        result = self._results.pop(ticket)
        if isinstance(result, BatchFailed):
            raise RolloutError(result.message)
        return result

    def cancel(self, ticket: Ticket) -> None:
        self._results.pop(ticket, None)
        self._cancelled.add(ticket)
        self._send(BatchCancel(ticket))

    def hear(self) -> None:
        while self._receive(lambda progress: None, wait_seconds=0.0):
            pass

    def pause(self, timeout_seconds: float = 60.0) -> None:
        self._set_gate(False, timeout_seconds)

    def resume(self, timeout_seconds: float = 60.0) -> None:
        self._set_gate(True, timeout_seconds)

    def close(self) -> None:
        """End the process: a message asks it to, a kill follows if it does not."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(None)
        try:
            self._process.wait(CLOSE_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._inbox.join()
        self._connection.close()
        self._temporary.cleanup()

    def _set_gate(self, is_open: bool, timeout_seconds: float) -> None:
        self._send(GateRequest(is_open))
        action = "resume" if is_open else "pause"
        self._wait_until(lambda: bool(self._gate_replies), timeout_seconds, action)
        self._gate_replies.popleft()

    def _send(self, message: BatchOrder | BatchCancel | GateRequest) -> None:
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
            self._receive(on_progress, wait_seconds=POLL_SECONDS)

    def _receive(
        self, on_progress: Callable[[BatchProgress], None], *, wait_seconds: float
    ) -> bool:
        """Take in one message; whether there was one."""
        try:
            message = self._inbox.next(wait_seconds)
        except EOFError as error:
            if not isinstance(error.__cause__, EOFError | OSError):
                raise RolloutError(
                    f"a message of the rollout pool cannot be read: {error.__cause__!r}; its log "
                    f"is {self._log_path}"
                ) from error
            raise self._died() from error
        if isinstance(message, PoolReady):
            self._is_ready = True
        elif isinstance(message, BatchProgress):
            self._on_spans(message.spans)
            on_progress(message)
        elif isinstance(message, BatchDone):
            self._on_spans(message.result.spans)
            self._counters = message.counters
            self._keep(message.ticket, message.result)
        elif isinstance(message, BatchFailed):
            self._keep(message.ticket, message)
        elif isinstance(message, GateReply):
            self._gate_replies.append(message)
        elif isinstance(message, PoolFailure):
            raise RolloutError(message.message)
        return message is not None

    def _keep(self, ticket: Ticket, result: RolloutResult | BatchFailed) -> None:
        """Until it is collected, unless nobody will."""
        if ticket not in self._cancelled:
            self._results[ticket] = result


class _Inbox:
    """The messages of the pool process, read by a thread."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="rollout-messages", daemon=True)
        self._thread.start()

    def next(self, wait_seconds: float) -> Any:
        """The next message, or None if none comes in time.

        Raises:
            EOFError: the process has ended, and everything that it said was taken.
        """
        try:
            message = self._messages.get(wait_seconds > 0, wait_seconds)
        except queue.Empty:
            return None
        if isinstance(message, _Closed):
            self._messages.put(message)
            raise EOFError from message.cause
        return message

    def join(self) -> None:
        """Wait until the process has closed its end."""
        self._thread.join(CLOSE_TIMEOUT_SECONDS)

    def _read(self) -> None:
        try:
            while True:
                self._messages.put(self._connection.recv())
        except Exception as error:
            # Also what cannot be unpickled: nothing that comes after it could be read.
            self._messages.put(_Closed(error))


@dataclass(frozen=True)
class _Closed:
    """The pipe's other end is closed, or nothing more can be read from it."""

    cause: Exception
