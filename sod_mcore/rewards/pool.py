"""Runs graders in processes of their own, each answer under a hard limit of time and memory.

Answers are written by a model that is rewarded for the verdict: some keep a grader busy for ever,
some crash it. Such a grader is killed with its process, and neither the event loop nor other
answers notice.
"""

import asyncio
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

from sod_mcore.rewards.interface import Grader, Verdict
from sod_mcore.rewards.worker_handle import GraderTimeoutError, WorkerHandle
from sod_mcore.tools import InfrastructureError

DEFAULT_MEMORY_BYTES = 4 << 30


class GraderPool:
    """A fixed number of grading processes; requests beyond that wait in turn.

    An asynchronous context manager. All calls belong to one event loop, and the processes die with
    the thread that runs it.
    """

    def __init__(
        self,
        *,
        workers: int,
        timeout_seconds: float,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        """Remember the settings; nothing is started.

        Args:
            workers: processes.
            timeout_seconds: CPU time of one grading; six times that by the clock end it too, from
                its start, not from its queueing.
            memory_bytes: address space of each process.
        """
        if workers < 1 or not timeout_seconds > 0:
            raise ValueError(
                f"GraderPool: workers = {workers}, timeout_seconds = {timeout_seconds}: give at "
                "least 1 worker and more than 0 seconds"
            )
        self._worker_count = workers
        self._timeout_seconds = timeout_seconds
        self._memory_bytes = memory_bytes
        self._slots = asyncio.Semaphore(workers)
        self._workers: set[WorkerHandle] = set()
        self._idle: list[WorkerHandle] = []
        self._is_closed = False

    async def start(self) -> None:
        """Start all processes, which proves that they can be.

        Raises:
            InfrastructureError: one did not start.
        """
        missing = self._worker_count - len(self._workers)
        try:
            self._idle += await asyncio.gather(*(self._start_worker() for _ in range(missing)))
        except BaseException:
            await self.close()
            raise

    async def grade(
        self,
        grader: Grader,
        response_text: str,
        ground_truth: str,
        extra_info: Mapping[str, object],
    ) -> Verdict:
        """Run a grader in one of the processes; its arguments are :meth:`Verifier.verify`'s.

        Returns:
            The grader's verdict, or one of category "timeout".

        Raises:
            ValueError: the grader calls the data row unusable.
            InfrastructureError: the process died under the grader, the grader raised something
                else, or the pool is closed.
        """
        pickled_grader = pickle.dumps(grader)
        arguments = pickle.dumps((response_text, ground_truth, dict(extra_info)))
        async with self._slots:
            worker = await self._take_worker()
            reply = None
            try:
                reply = await worker.ask(pickled_grader, arguments)
            except GraderTimeoutError:
                return Verdict("timeout")
            finally:
                if reply is None:
                    self._workers.discard(worker)
                    await worker.kill()
                else:
                    self._idle.append(worker)
        if "unusable_row" in reply:
            raise ValueError(reply["unusable_row"])
        if "failure" in reply:
            raise InfrastructureError(f"the grader {grader!r} failed: {reply['failure']}")
        return Verdict(**reply["verdict"])

    async def close(self) -> None:
        """Kill all processes; gradings that still run or wait raise InfrastructureError."""
        self._is_closed = True
        self._idle.clear()
        await asyncio.gather(*(worker.kill() for worker in self._workers))
        self._workers.clear()

    async def __aenter__(self) -> "GraderPool":
        """Start the processes."""
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Kill the processes."""
        await self.close()

    async def _take_worker(self) -> WorkerHandle:
        """An idle process, or a new one in place of one that is gone."""
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            self._workers.discard(worker)
        return await self._start_worker()

    async def _start_worker(self) -> WorkerHandle:
        self._refuse_if_closed()
        worker = await WorkerHandle.start(self._memory_bytes, self._timeout_seconds)
        try:
            self._refuse_if_closed()
        except InfrastructureError:
            await worker.kill()
            raise
        self._workers.add(worker)
        return worker

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise InfrastructureError("the pool of graders is closed")


@dataclass(frozen=True)
class PooledVerifier:
    """A verifier that runs a grader in a pool."""

    grader: Grader
    pool: GraderPool

    async def verify(
        self, response_text: str, ground_truth: str, extra_info: Mapping[str, object]
    ) -> Verdict:
        """Judge a response; see :meth:`Verifier.verify`."""
        return await self.pool.grade(self.grader, response_text, ground_truth, extra_info)
