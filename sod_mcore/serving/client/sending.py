"""One try of a request: sent to one engine, or to a second one as well where the first is slow.

What goes wrong on the way decides whether the engine is used further.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sod_mcore.serving.client.counters import Tally
from sod_mcore.serving.client.json_http import (
    TOO_MANY_REQUESTS,
    EngineError,
    JsonHttp,
    RequestTimeoutError,
)
from sod_mcore.serving.client.messages import oldest_weight_version, require_meta_info
from sod_mcore.serving.client.recovery import Recovery
from sod_mcore.serving.client.replicas import Affinity, Replica, Replicas

ABORT_SECONDS = 5.0


@dataclass
class Call:
    """One request of a caller, through all its tries.

    Attributes:
        rid: its name.
        request: the document without name and model.
        affinity: what it shares with others.
        tokens: its work: the input, and the most that may be sampled.
        seconds_left: time that engines still have to answer it.
        sent: how often it was sent.
    """

    rid: str
    request: Mapping[str, Any]
    affinity: Affinity | None
    tokens: int
    seconds_left: float
    sent: int = 0

    @property
    def is_scoring(self) -> bool:
        """Whether nothing is sampled, so that every engine gives the same answer."""
        return not self.request["sampling_params"]["max_new_tokens"]

    def next_rid(self) -> str:
        """A new name each time: an engine may still be at work on the one before."""
        self.sent += 1
        return self.rid if self.sent == 1 else f"{self.rid}.{self.sent}"


class Sender:
    """Sends requests to the engines of one model.

    Args:
        model: its name.
        replicas: its engines.
        http: the connections.
        recovery: takes engines that fail.
        tally: counts what happens.
        hedge_after_seconds: when a scoring request goes to a second engine; None for never.
    """

    def __init__(
        self,
        model: str,
        replicas: Replicas,
        http: JsonHttp,
        recovery: Recovery,
        tally: Tally,
        hedge_after_seconds: float | None,
    ) -> None:
        self._model = model
        self._replicas = replicas
        self._http = http
        self._recovery = recovery
        self._tally = tally
        self._hedge_after_seconds = hedge_after_seconds
        self._ending: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Wait until the engines were told which requests nobody waits for any more."""
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def send(self, call: Call, replica: Replica) -> dict[str, Any]:
        """One try; its time is taken from what the request has left.

        Raises:
            EngineError: no engine gave an answer that can be used.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        deadline = started + call.seconds_left
        try:
            if call.is_scoring and self._hedge_after_seconds is not None:
                return await self._ask_two(call, replica, deadline, self._hedge_after_seconds)
            return await self._ask(call, replica, deadline)
        finally:
            call.seconds_left -= loop.time() - started

    async def _ask_two(
        self, call: Call, first: Replica, deadline: float, hedge_after_seconds: float
    ) -> dict[str, Any]:
        """Ask one engine, and a second one if it is slow; the first answer counts."""
        tasks = [asyncio.create_task(self._ask(call, first, deadline))]
        try:
            done, _ = await asyncio.wait(tasks, timeout=hedge_after_seconds)
            second = None
            if not done:
                second = self._replicas.choose(call.tokens, other_than=first)
            if second is not None:
                self._tally.add(hedged=1)
                tasks.append(asyncio.create_task(self._ask(call, second, deadline)))
            for answer in asyncio.as_completed(tasks):
                with contextlib.suppress(EngineError):
                    return await answer
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
                self._let_end(task)

    async def _ask(self, call: Call, replica: Replica, deadline: float) -> dict[str, Any]:
        """Ask one engine, and use it no more for now if that fails."""
        rid, required = call.next_rid(), self._replicas.required_version
        document = {"model": self._model, "rid": rid, **call.request}
        seconds = deadline - asyncio.get_running_loop().time()
        with self._replicas.working(replica, call.tokens):
            try:
                answer = await self._http.post(f"{replica.url}/generate", document, seconds)
                require_meta_info(replica.url, answer)
            except asyncio.CancelledError:
                self._abort(replica, rid)
                raise
            except EngineError as error:
                self._note_failure(replica, rid, error)
                raise
        if required is not None:
            self._refuse_stale(replica, oldest_weight_version(answer), required)
        return answer

    def _refuse_stale(self, replica: Replica, version: int, required: int) -> None:
        if version >= required:
            return
        problem = f"answered with weight version {version}, not {required}"
        self._tally.add(stale_answers=1)
        replica.weight_version = version
        self._recovery.mark_down(self._replicas, replica, problem, "stale")
        raise EngineError(f"{replica.url} {problem}", retryable=True)

    def _note_failure(self, replica: Replica, rid: str, error: EngineError) -> None:
        if not error.retryable or error.status == TOO_MANY_REQUESTS:
            return  # the fault is the request's, or the engine is only busy
        self._recovery.mark_down(self._replicas, replica, str(error), "failed")
        if isinstance(error, RequestTimeoutError):
            self._tally.add(timeouts=1)
            self._abort(replica, rid)
        elif error.status is None:
            self._tally.add(connection_failures=1)
        else:
            self._tally.add(bad_answers=1)

    def _abort(self, replica: Replica, rid: str) -> None:
        """Tell an engine that nobody waits for an answer, without waiting for its own."""

        async def tell() -> None:
            with contextlib.suppress(EngineError):
                url = f"{replica.url}/abort_request"
                await self._http.post(url, {"rid": rid}, ABORT_SECONDS)

        self._let_end(asyncio.create_task(tell()))

    def _let_end(self, task: asyncio.Task[Any]) -> None:
        self._ending.add(task)
        task.add_done_callback(self._note_end)

    def _note_end(self, task: asyncio.Task[Any]) -> None:
        self._ending.discard(task)
        if not task.cancelled():
            task.exception()  # of a loser; asyncio complains where nobody has looked at it
