"""The pool process: ``python -m sod_mcore.rollout.worker FD TMPDIR``.

``process_pool.py`` starts it. It alone talks to the engines' generate endpoints. One asyncio loop
runs every conversation, the tool calls and the scoring; one thread reads the pipe. When the pipe
closes, the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from typing import Any

from sod_mcore.rollout.batch import run_batch
from sod_mcore.rollout.group import UnusableRowError
from sod_mcore.rollout.pool import (
    CLOSE_TIMEOUT_SECONDS,
    URGENT,
    PoolSettings,
    Ticket,
    describe_failure,
)
from sod_mcore.rollout.process_pool import (
    BatchCancel,
    BatchDone,
    BatchFailed,
    BatchOrder,
    BatchProgress,
    GateReply,
    GateRequest,
    PoolFailure,
    PoolReady,
)
from sod_mcore.rollout.request import RolloutProgress
from sod_mcore.rollout.services import RolloutServices, open_services
from sod_mcore.rollout.slots import Slots
from sod_mcore.timeline import SpanRecorder

_PROGRESS_SECONDS = 0.25


def main() -> None:
    """Serve batches until the pipe closes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    connection = Connection(int(sys.argv[1]))
    settings = connection.recv()
    try:
        asyncio.run(_serve(connection, settings))
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(BrokenPipeError):
            connection.send(PoolFailure(describe_failure(error)))
        raise SystemExit(1) from error
    finally:
        shutil.rmtree(sys.argv[2], ignore_errors=True)


async def _serve(connection: Connection, settings: PoolSettings) -> None:
    messages = _message_queue(connection)
    async with AsyncExitStack() as stack:
        services = await open_services(settings, stack)
        connection.send(PoolReady())
        batches = _Batches(connection, settings, services)
        try:
            await _dispatch(messages, batches, connection, services)
        finally:
            await batches.end()


async def _dispatch(
    messages: asyncio.Queue[Any],
    batches: _Batches,
    connection: Connection,
    services: RolloutServices,
) -> None:
    """Begin what is asked for until the pipe closes."""
    next_message = asyncio.create_task(messages.get())
    while True:
        await asyncio.wait({next_message, *batches.running}, return_when=asyncio.FIRST_COMPLETED)
        batches.forget_finished()
        if not next_message.done():
            continue
        message = next_message.result()
        if message is None:
            return
        if isinstance(message, GateRequest):
            await services.set_gate(message.is_open)
            connection.send(GateReply(message.is_open))
        elif isinstance(message, BatchCancel):
            batches.cancel(message.ticket)
        else:
            batches.begin(message)
        next_message = asyncio.create_task(messages.get())


class _Batches:
    """The batches under way, which share the slots."""

    def __init__(
        self, connection: Connection, settings: PoolSettings, services: RolloutServices
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._services = services
        self._slots = Slots(settings.rollout.concurrency)
        self.running: set[asyncio.Task[None]] = set()

    def begin(self, order: BatchOrder) -> None:
        """Work on a batch beside the others."""
        if order.request.weight_version is not None:
            self._services.require_weights(order.request.weight_version)
        self.running.add(asyncio.create_task(self._run(order), name=str(order.ticket)))

    def cancel(self, ticket: Ticket) -> None:
        """Give up a batch, if it still runs."""
        for task in self.running:
            if task.get_name() == str(ticket):
                task.cancel()

    def forget_finished(self) -> None:
        """Let go of finished batches; what ended one by a fault of ours is raised."""
        finished = {task for task in self.running if task.done()}
        self.running -= finished
        for task in finished:
            if not task.cancelled():
                task.result()

    async def end(self) -> None:
        """Give up what still runs."""
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)

    async def _run(self, order: BatchOrder) -> None:
        recorder = SpanRecorder()
        try:
            result = await run_batch(
                order.request,
                self._services.batch_services,
                slots=self._slots,
                priority=URGENT if order.request.is_urgent else order.ticket,
                attempts=self._settings.rollout.attempts,
                on_progress=_throttled_sender(self._connection, order.ticket, recorder),
                recorder=recorder,
            )
        except UnusableRowError as error:
            # The steps before this one can still be trained, and be saved.
            traceback.print_exc()
            self._connection.send(BatchFailed(order.ticket, describe_failure(error)))
            return
        self._connection.send(BatchDone(order.ticket, result, self._services.counters()))


def _throttled_sender(
    connection: Connection, ticket: Ticket, recorder: SpanRecorder
) -> Callable[[RolloutProgress], None]:
    loop = asyncio.get_running_loop()
    next_time = loop.time()

    def send(progress: RolloutProgress) -> None:
        nonlocal next_time
        is_done = progress.finished + progress.dropped == progress.total
        if is_done or loop.time() >= next_time:
            next_time = loop.time() + _PROGRESS_SECONDS
            connection.send(BatchProgress(ticket, progress, recorder.take()))

    return send


def _message_queue(connection: Connection) -> asyncio.Queue[Any]:
    """Messages of the trainer, read by a thread; None when the pipe has closed."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Any] = asyncio.Queue()

    def read() -> None:
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                # The trainer is gone: nobody else would end a pool that hangs while closing.
                overdue = threading.Timer(CLOSE_TIMEOUT_SECONDS, os._exit, [1])
                overdue.daemon = True
                overdue.start()
                loop.call_soon_threadsafe(queue.put_nowait, None)
                return
            loop.call_soon_threadsafe(queue.put_nowait, message)

    threading.Thread(target=read, name="trainer-messages", daemon=True).start()
    return queue


if __name__ == "__main__":
    main()
