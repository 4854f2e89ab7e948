"""Sends requests to the engines of a model: to the right one, and to another where that fails.

The client chooses the engine itself (``replicas``); the routers are for people and other programs.
What fails in a way that may pass is tried again: an engine that cannot be reached, answers 5xx, or
does not answer in time is not used until it is well (``recovery``).
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from sod_mcore.serving.client.counters import ClientCounters, Tally
from sod_mcore.serving.client.json_http import (
    TOO_MANY_REQUESTS,
    EngineError,
    JsonHttp,
    RequestTimeoutError,
)
from sod_mcore.serving.client.messages import (
    Generation,
    SamplingSettings,
    TokenIds,
    check_token_ids,
    read_generation,
)
from sod_mcore.serving.client.recovery import Backoff, Recovery
from sod_mcore.serving.client.replicas import Affinity, Replica, Replicas
from sod_mcore.serving.client.sending import Call, Sender
from sod_mcore.serving.endpoints import Endpoints

Admission = Callable[[], AbstractAsyncContextManager[object]]
FindEngines = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class _Connections:
    """What exists while the client is open."""

    http: JsonHttp
    recovery: Recovery
    senders: Mapping[str, Sender]


class EngineClient:
    """Requests to the served models over one pool of connections; an async context manager.

    Args:
        endpoints: the fleet.
        request_timeout_seconds: longest time that the engines get for one request, all its tries
            included.
        restart_timeout_seconds: longest wait for an engine of a model that has none left. It counts
            neither as a try nor towards the timeout.
        hedge_after_seconds: a scoring request that has waited so long is sent to a second engine as
            well, and the first answer counts; None waits for the first engine. Both would give the
            same numbers. What is sampled is never hedged: the answer that comes first is more often
            a short one, so the samples would be biased towards short answers.
        max_connections: open requests to one model, a hedged one counting once; more wait for their
            turn, which does not count towards the timeout.
        attempts: tries of a request that fails in a way that may pass: no connection, 429, 5xx,
            weights that are too old.
        first_backoff_seconds: the pause before a busy engine (429) gets the request again, and
            before an engine that failed is asked how it is; it doubles from time to time up to
            ``longest_backoff_seconds``, and a random half of it is left out so that clients do not
            come back in step.
        keep_alive: use connections again. A caller that keeps the event loop from running for
            seconds must not: it would not notice that the server has closed them.
        admission: entered around each try, and not while a request waits for an engine: what holds
            it back holds back requests to the engines, and knows when none is in flight.
        find_engines: base URLs that a model's engines have now, in the order of ``endpoints``, or
            none where that is not known; asked when one of them does not answer, since the fleet
            may have started it again elsewhere.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        *,
        request_timeout_seconds: float = 300.0,
        restart_timeout_seconds: float = 300.0,
        hedge_after_seconds: float | None = None,
        max_connections: int = 256,
        attempts: int = 5,
        first_backoff_seconds: float = 0.25,
        longest_backoff_seconds: float = 8.0,
        keep_alive: bool = True,
        admission: Admission = contextlib.nullcontext,
        find_engines: FindEngines = lambda model: (),
    ) -> None:
        self.endpoints = endpoints
        self._request_timeout_seconds = request_timeout_seconds
        self._restart_timeout_seconds = restart_timeout_seconds
        self._attempts = attempts
        self._backoff = Backoff(first_backoff_seconds, longest_backoff_seconds)
        self._keep_alive = keep_alive
        self._admission = admission
        self._find_engines = find_engines
        self._hedge_after_seconds = hedge_after_seconds
        self._slots = {name: asyncio.Semaphore(max_connections) for name in endpoints.models}
        self._replicas = {name: Replicas(m.engines) for name, m in endpoints.models.items()}
        self._tallies = {name: Tally() for name in endpoints.models}
        self._open: _Connections | None = None

    async def __aenter__(self) -> EngineClient:
        http = JsonHttp(keep_alive=self._keep_alive)
        recovery = Recovery(http, self._backoff, self._locate)
        senders = {
            name: Sender(
                name,
                replicas,
                http,
                recovery,
                self._tallies[name],
                self._hedge_after_seconds,
            )
            for name, replicas in self._replicas.items()
        }
        self._open = _Connections(http, recovery, senders)
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for sender in self._connections.senders.values():
            await sender.close()
        await self._connections.recovery.close()
        await self._connections.http.close()
        self._open = None

    async def generate(
        self,
        model: str,
        input_ids: TokenIds,
        sampling: SamplingSettings,
        *,
        rid: str,
        affinity: Affinity | None = None,
        in_flight: AbstractContextManager[None] | None = None,
    ) -> Generation:
        """Sample tokens after ``input_ids``.

        Args:
            model: name of a served model.
            input_ids: ``[T]`` token ids.
            sampling: how to sample.
            rid: name of the request, unique among those that run; a second try gets a suffix.
            affinity: what the request shares with others, so that it finds its prefix cached.
            in_flight: as for :meth:`post_generate`.

        Raises:
            EngineError: refused, or failed in every try, or past a deadline.
            ValueError: an id outside the vocabulary.
        """
        request = {
            "input_ids": check_token_ids(self.endpoints.model(model), input_ids),
            "sampling_params": sampling.as_request(),
            "return_logprob": True,
        }
        answer = await self.post_generate(
            model, request, rid=rid, affinity=affinity, in_flight=in_flight
        )
        return read_generation(answer)

    async def post_generate(
        self,
        model: str,
        request: Mapping[str, Any],
        *,
        rid: str | None = None,
        affinity: Affinity | None = None,
        in_flight: AbstractContextManager[None] | None = None,
    ) -> dict[str, Any]:
        """Send one request to ``/generate`` of an engine and return the decoded answer.

        When the caller is cancelled or the deadline passes, the engine is told to abort.

        Args:
            request: with ``input_ids`` and ``sampling_params.max_new_tokens``.
            in_flight: held from the first try to the answer, without the wait for a connection or
                for admission before it.

        Raises:
            EngineError: refused, or failed in every try, or past a deadline.
        """
        self.endpoints.model(model)  # refuses a model that is not served
        call = Call(
            rid or uuid.uuid4().hex,
            request,
            affinity,
            tokens=len(request["input_ids"]) + request["sampling_params"]["max_new_tokens"],
            seconds_left=self._request_timeout_seconds,
        )
        async with self._slots[model]:
            self._tallies[model].add(requests=1)
            return await self._until_answered(model, call, in_flight or contextlib.nullcontext())

    def require_version(self, model: str, version: int) -> None:
        """Use engines of ``model`` only once they report at least this version of the weights.

        They are asked at once; requests wait until each that has not failed has answered.
        Requests that are sent from now on are answered with it or a later one: an older answer is
        discarded, and the request goes elsewhere or waits. So an engine that was started again
        serves nothing before it has got the weights.
        """
        self.endpoints.model(model)  # refuses a model that is not served
        replicas = self._replicas[model]
        for replica in replicas.require_version(version):
            problem = f"has not reported weight version {version} yet"
            self._connections.recovery.mark_down(replicas, replica, problem, "unasked")

    def forget(self, model: str, key: str) -> None:
        """Forget which engine serves the requests of :attr:`Affinity.key`: it has ended."""
        self._replicas[model].forget(key)

    def counters(self, model: str) -> ClientCounters:
        """What happened to the requests to ``model`` so far."""
        return self._tallies[model].counters

    async def get(self, url: str) -> dict[str, Any]:
        """GET a JSON document (one try).

        Raises:
            EngineError: the server did not answer with 200 and JSON.
        """
        return await self._connections.http.get(url, self._request_timeout_seconds)

    async def post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST a JSON document (one try).

        Raises:
            EngineError: the server did not answer with 200 and JSON.
        """
        return await self._connections.http.post(url, body, self._request_timeout_seconds)

    async def post_stream(self, url: str, body: AsyncIterator[bytes]) -> dict[str, Any]:
        """POST a JSON document whose pieces are made while it is sent (one try).

        Raises:
            EngineError: the server did not answer with 200 and JSON.
        """
        seconds = self._request_timeout_seconds
        return await self._connections.http.post_stream(url, body, seconds)

    async def _until_answered(
        self, model: str, call: Call, in_flight: AbstractContextManager[None]
    ) -> dict[str, Any]:
        sender = self._connections.senders[model]
        with contextlib.ExitStack() as from_first_try:
            for tries in range(1, self._attempts + 1):
                async with self._engine_for(model, call) as replica:
                    if tries == 1:
                        from_first_try.enter_context(in_flight)
                    try:
                        return await sender.send(call, replica)
                    except EngineError as error:
                        self._raise_if_final(model, call, error, tries)
                        is_busy = error.status == TOO_MANY_REQUESTS
                self._tallies[model].add(retries=1)
                if is_busy:
                    await self._pause(call, tries)
        raise AssertionError("unreachable: the last try returns or raises")

    def _raise_if_final(self, model: str, call: Call, error: EngineError, tries: int) -> None:
        """Raise what ends a request; return where another try may help."""
        if not error.retryable:
            raise error
        if isinstance(error, RequestTimeoutError) or call.seconds_left <= 0:
            message = f"{model}: no answer within {self._request_timeout_seconds:g} s: {error}"
            raise EngineError(message, retryable=True) from error
        if tries == self._attempts:
            message = f"{model}: gave up after {tries} tries: {error}"
            raise EngineError(message, retryable=True) from error

    async def _pause(self, call: Call, tries: int) -> None:
        """Leave a busy engine alone for a while."""
        seconds = min(self._backoff.seconds(tries), call.seconds_left)
        call.seconds_left -= seconds
        await asyncio.sleep(seconds)

    @contextlib.asynccontextmanager
    async def _engine_for(self, model: str, call: Call) -> AsyncIterator[Replica]:
        """The engine for the next try, once there is one and the try is admitted."""
        while True:
            await self._wait_until_usable(model)
            async with self._admission():
                replica = self._replicas[model].choose(call.tokens, call.affinity)
                if replica is not None:  # else the last one went down before the try was admitted
                    yield replica
                    return

    async def _wait_until_usable(self, model: str) -> None:
        replicas, loop = self._replicas[model], asyncio.get_running_loop()
        if replicas.are_usable:
            return
        started = loop.time()
        try:
            await self._wait_while_some_may_come(model, replicas)
        finally:
            self._tallies[model].add(seconds_waited=loop.time() - started)

    async def _wait_while_some_may_come(self, model: str, replicas: Replicas) -> None:
        """A healthy engine that lacks weights gets them when the trainer has time for it, which may
        be after a long step: the caller's own deadline bounds that wait."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._restart_timeout_seconds):
                    return await replicas.wait_until_usable()
            if not replicas.wait_for_weights:
                raise EngineError(
                    f"{model}: none of its {len(replicas.all)} engine(s) answered for "
                    f"{self._restart_timeout_seconds:g} s (serving.restart_timeout_seconds; raise "
                    f"it where a restart takes longer): {replicas.problems()}",
                    retryable=True,
                )

    def _locate(self, replica: Replica) -> str:
        """The address of an engine now."""
        for model, replicas in self._replicas.items():
            if replica in replicas.all:
                urls = self._find_engines(model)
                known = len(urls) == len(replicas.all)
                return urls[replicas.all.index(replica)] if known else replica.url
        raise AssertionError("unreachable: every replica is one of ours")

    @property
    def _connections(self) -> _Connections:
        if self._open is None:
            raise RuntimeError("EngineClient is used outside of `async with EngineClient(...)`")
        return self._open
