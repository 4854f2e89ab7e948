"""Calls that may never return, in threads that do not keep a process from ending."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def call_in_thread(work: Callable[[], Result], name: str) -> Future[Result]:
    """Begin ``work`` in a thread of its own; its result, or its error, comes with the future."""
    outcome: Future[Result] = Future()

    def run() -> None:
        outcome.set_running_or_notify_cancel()  # nobody who stops waiting cancels it from here on
        try:
            result = work()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome


async def in_thread(work: Callable[[], Result]) -> Result:
    """Wait for a call that blocks, for ever if what it asks is gone."""
    return await asyncio.wrap_future(call_in_thread(work, "ray-call"))
