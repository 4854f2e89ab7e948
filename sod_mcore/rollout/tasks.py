"""Several coroutines at once, none of which is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


async def all_or_first_error(jobs: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results in order; the first error ends the other jobs and is raised."""
    return await first_of(jobs, len(jobs))


async def first_of(jobs: Sequence[Coroutine[Any, Any, Result]], count: int) -> list[Result]:
    """Results of the first ``count`` jobs to finish, in the order of ``jobs``; the rest are ended.

    The first error ends all of them and is raised.
    """
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        for number_done, earliest in enumerate(asyncio.as_completed(tasks), start=1):
            await earliest
            if number_done == count:
                break
        return [task.result() for task in tasks if task.done()][:count]
    finally:
        await cancel(*tasks)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """End what still runs, and wait for its end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
