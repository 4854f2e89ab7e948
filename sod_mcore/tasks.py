"""Several coroutines at once, none of which is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


async def all_or_first_error(jobs: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results in order; the first error ends the other jobs and is raised."""
    return await first_of(jobs, len(jobs))


async def first_of(
    jobs: Sequence[Coroutine[Any, Any, Result]],
    count: int,
    is_wanted: Callable[[Result], bool] = lambda result: True,
) -> list[Result]:
    """Results of the first ``count`` wanted jobs to finish, in the order of ``jobs``.

    The other jobs are ended. Where fewer are wanted, unwanted ones fill up. The first error ends
    all jobs and is raised.
    """
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        num_wanted = 0
        for earliest in asyncio.as_completed(tasks):
            num_wanted += is_wanted(await earliest)
            if num_wanted == count:
                break
        done = [task for task in tasks if task.done()]
        best = sorted(done, key=lambda task: not is_wanted(task.result()))[:count]
        return [task.result() for task in tasks if task in best]
    finally:
        await cancel(*tasks)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """End what still runs, and wait for its end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
