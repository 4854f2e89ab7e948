"""The pool process: ``python -m sod_mcore.rollout.worker FD TMPDIR``, started by ``pool.py``.

It alone talks to the engines' generate endpoints. One asyncio loop runs every conversation, the
tool calls and the scoring; one thread reads the pipe. When the pipe closes, the process ends.
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

from sod_mcore.rollout.batch import RolloutProgress, RolloutRequest, run_batch
from sod_mcore.rollout.pool import (
    CLOSE_TIMEOUT_SECONDS,
    GateReply,
    GateRequest,
    PoolFailure,
    PoolReady,
    PoolSettings,
)
from sod_mcore.rollout.services import RolloutServices, open_services

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
            connection.send(PoolFailure(f"rollout pool: {type(error).__name__}: {error}"))
        raise SystemExit(1) from error
    finally:
        shutil.rmtree(sys.argv[2], ignore_errors=True)


async def _serve(connection: Connection, settings: PoolSettings) -> None:
    messages = _message_queue(connection)
    async with AsyncExitStack() as stack:
        services = await open_services(settings, stack)
        connection.send(PoolReady())
        batches: asyncio.Queue[RolloutRequest] = asyncio.Queue()
        worker = asyncio.create_task(_work(connection, settings, services, batches))
        try:
            await _dispatch(messages, batches, worker, connection, services)
        finally:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)


async def _dispatch(
    messages: asyncio.Queue[Any],
    batches: asyncio.Queue[RolloutRequest],
    worker: asyncio.Task[None],
    connection: Connection,
    services: RolloutServices,
) -> None:
    """Hand batches to the worker; gate requests are answered while a batch runs."""
    while True:
        next_message = asyncio.create_task(messages.get())
        await asyncio.wait({next_message, worker}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            next_message.cancel()
            worker.result()
        message = await next_message
        if message is None:
            return
        if isinstance(message, GateRequest):
            await services.set_gate(message.is_open)
            connection.send(GateReply(message.is_open))
        else:
            batches.put_nowait(message)


async def _work(
    connection: Connection,
    settings: PoolSettings,
    services: RolloutServices,
    batches: asyncio.Queue[RolloutRequest],
) -> None:
    while True:
        request = await batches.get()
        result = await run_batch(
            request,
            services.batch_services,
            concurrency=settings.rollout.concurrency,
            attempts=settings.rollout.attempts,
            on_progress=_throttled_sender(connection),
        )
        connection.send(result)


def _throttled_sender(connection: Connection) -> Callable[[RolloutProgress], None]:
    loop = asyncio.get_running_loop()
    next_time = loop.time()

    def send(progress: RolloutProgress) -> None:
        nonlocal next_time
        is_done = progress.finished + progress.dropped == progress.total
        if is_done or loop.time() >= next_time:
            next_time = loop.time() + _PROGRESS_SECONDS
            connection.send(progress)

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
