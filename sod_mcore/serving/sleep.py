"""Engines that sleep while the trainer works on their GPUs (``serving.placement: colocated``).

In every step of training:

1. The batch is there, scores included. :meth:`EngineSleep.sleep`: each engine is paused, so that
   what is sent to it later waits, and then releases its key-value cache and its weights.
2. The trainer works. The fleet starts no engine again that dies now.
3. The trainer has given back the memory that it only kept in reserve
   (:meth:`EngineSleep.end_training`). ``update_weights`` wakes the student's engines around its own
   steps: room for the weights, the new weights, their version confirmed, the key-value cache, and
   only then requests go on (:meth:`EngineSleep.wake`).
4. :meth:`EngineSleep.wake_others`: the other models' weights come back from the host's memory, then
   their cache. The next rollout begins, and is scored from its first trajectory on.

SGLang 0.5.23 ends if it has to release anything while a request runs that is not paused, to resume
what is there, or (on a GPU) to release what is not: so who sleeps is known here by process, and an
engine that was started again is awake.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from sod_mcore.config import ServingConfig
from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.json_http import EngineError, RequestTimeoutError
from sod_mcore.serving.endpoints import Endpoints, FleetError
from sod_mcore.serving.fleet.sleep_file import write_sleep
from sod_mcore.serving.fleet.state import (
    NOTICED_SECONDS,
    POLL_SECONDS,
    FleetState,
    read_fleet_state,
)
from sod_mcore.serving.weights.disk_transfer import DiskTransfer
from sod_mcore.serving.weights.update import (
    KV_CACHE,
    TRAINED_MODEL,
    WEIGHTS,
    MemoryTag,
    update_weights,
)
from sod_mcore.timeline import Clock, Span

WAKE, ASLEEP = "engine_wake", "engines_asleep"
"""Names of the spans: while rank 0 waits for memory to come back; from the sleep to the wake."""


@dataclass
class _Sleeper:
    """An engine that is asleep.

    Attributes:
        model: that it serves.
        incarnation: which process of the fleet it is.
        released: the memory that it has not got back; with none it still stands still.
    """

    model: str
    incarnation: int
    released: set[MemoryTag] = field(default_factory=lambda: {KV_CACHE, WEIGHTS})


class EngineSleep:
    """Puts the engines of a fleet to sleep and wakes them; used by global rank 0.

    Args:
        endpoints: the fleet, whose engines all run on this machine.
        serving: its settings.
        directory: the folder that it serves from.
        note: receives the spans, in lane 0 those in which rank 0 waits.
        should_stop: ends the wait for an engine that is being started again.
        free_memory: gives back what this process only keeps in reserve on its GPU, as after the
            weights were gathered; called before engines take their caches.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        serving: ServingConfig,
        directory: Path,
        *,
        note: Callable[[Span], None] = lambda span: None,
        should_stop: Callable[[], bool] = lambda: False,
        free_memory: Callable[[], None] = lambda: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._endpoints = endpoints
        self._serving = serving
        self._directory = directory
        self._note = note
        self._should_stop = should_stop
        self._free_memory = free_memory
        self._clock = clock
        self._asleep: dict[str, _Sleeper] = {}
        self._training_since: float | None = None

    def sleep(self) -> None:
        """Let all engines of all models release their memory; they have when this returns.

        One that is being started again is waited for. Nothing happens if the run is to stop
        meanwhile.

        Raises:
            FleetError: an engine does not release its memory, or was not ready in time.
        """
        asleep = self._wait_for_all()
        if asleep is None:
            return
        self._asleep = asleep
        # Written first: whenever this process ends from here on, the fleet wakes who is asleep.
        self._begin_training()
        asyncio.run(self._release_all(tuple(asleep)))

    def end_training(self) -> None:
        """The trainer's memory is free again: the fleet may start engines."""
        if self._training_since is not None:
            self._note(Span(ASLEEP, self._training_since, self._clock(), lane=1))
            self._training_since = None
            self._write()

    async def wake(self, client: EngineClient, engines: Sequence[str], tag: MemoryTag) -> None:
        """Give back one kind of memory to those of ``engines`` that are asleep.

        Raises:
            EngineError: an engine refused or did not answer.
        """
        sleeping = set(self._sleeping()) & set(engines)
        waiting = [url for url in sleeping if tag in self._asleep[url].released]
        if waiting:
            if tag == KV_CACHE:
                self._free_memory()
            with self._waking():
                await _to_all(self._resume(client, url, tag) for url in waiting)

    def are_awake(self, engines: Sequence[str]) -> None:
        """Take those of ``engines`` that have all their memory off the record: they answer again.

        Not before: the fleet starts again what is on it when this process dies.
        """
        for url in set(self._asleep) & set(engines):
            if not self._asleep[url].released:
                self._is_awake(url)

    def wake_others(self) -> None:
        """Wake the engines of models that got no weights: they have their own again.

        Raises:
            FleetError: an engine does not take its memory back.
        """
        others = self._sleeping(lambda model: model != TRAINED_MODEL)
        if others:
            with self._waking():
                asyncio.run(self._wake_whole_models(others))

    def close(self) -> None:
        """Leave the fleet awake, as others expect it; the student has the weights of its start.

        Raises:
            FleetError: an engine does not take its memory back.
            WeightUpdateError: an engine of the student does not take weights. The fleet starts
                again what is still asleep when this process ends.
        """
        try:
            self.end_training()  # writes to a disk that may be full
        finally:
            try:
                self.wake_others()
            finally:
                self._wake_student()

    def _wake_student(self) -> None:
        engines = self._sleeping(lambda model: model == TRAINED_MODEL)
        if not engines:
            return
        served = replace(self._endpoints.model(TRAINED_MODEL), engines=engines)
        update_weights(
            replace(self._endpoints, models={TRAINED_MODEL: served}),
            TRAINED_MODEL,
            DiskTransfer(Path(served.model_path)),
            0,
            self._serving.request_timeout_seconds,
            sleep=self,
        )

    def _wait_for_all(self) -> dict[str, _Sleeper] | None:
        """Every engine, as one that is about to sleep; None if the run is to stop before."""
        deadline = time.monotonic() + self._serving.restart_timeout_seconds
        while True:
            state = read_fleet_state(self._directory)
            ready = {
                url: _Sleeper(name, incarnation)
                for name in self._endpoints.models
                for url, incarnation in state.incarnations(name).items()
            }
            missing = [u for m in self._endpoints.models.values() for u in m.engines]
            missing = [url for url in missing if url not in ready]
            if not missing:
                return ready
            if self._should_stop():
                return None
            if time.monotonic() > deadline:
                raise FleetError(
                    f"{', '.join(missing)}: not ready within serving.restart_timeout_seconds="
                    f"{self._serving.restart_timeout_seconds:g}, so that its memory cannot be "
                    "released for the trainer; raise it where a start takes longer"
                )
            time.sleep(POLL_SECONDS)

    async def _release_all(self, engines: Sequence[str]) -> None:
        async with self._client() as client:
            await _to_all(self._release(client, url) for url in engines)

    async def _release(self, client: EngineClient, url: str) -> None:
        model = self._asleep[url].model
        try:
            # Requests that run become requests that wait; in place, they would keep their cache.
            await client.post(f"{url}/pause_generation", {"mode": "retract"})
            request = {"tags": [KV_CACHE, WEIGHTS]}
            await client.post(f"{url}/release_memory_occupation", request)
        except EngineError as error:
            if await self._has_died(url, error):
                self._is_awake(url)
                return
            if error.status is not None:
                self._asleep[url].released.clear()
            raise FleetError(
                f"{model}: {url} does not release its memory, which the trainer needs "
                f"(serving.placement=colocated): {error}"
            ) from error

    async def _wake_whole_models(self, engines: Sequence[str]) -> None:
        async with self._client() as client:
            await _to_all(self._wake_whole(client, url) for url in engines)

    async def _wake_whole(self, client: EngineClient, url: str) -> None:
        model = self._asleep[url].model
        try:
            # Its prefix cache was emptied when it fell asleep, and nothing has run since.
            await self._resume(client, url, WEIGHTS)
            await self._resume(client, url, KV_CACHE)
            await client.post(f"{url}/continue_generation", {})
        except EngineError as error:
            if not await self._has_died(url, error):
                raise FleetError(
                    f"{model}: {url} does not take its memory back: {error}"
                ) from error
        self._is_awake(url)

    async def _resume(self, client: EngineClient, url: str, tag: MemoryTag) -> None:
        """Give it back unless it is there, which would end the engine."""
        released = self._asleep[url].released
        if tag not in released:
            return
        await client.post(f"{url}/resume_memory_occupation", {"tags": [tag]})
        released.remove(tag)

    def _sleeping(self, is_meant: Callable[[str], bool] = lambda model: True) -> tuple[str, ...]:
        """Base URLs of the sleeping engines of the models that ``is_meant`` picks by name."""
        self._forget_dead()
        return tuple(url for url, sleeper in self._asleep.items() if is_meant(sleeper.model))

    def _forget_dead(self) -> None:
        """A process that has died sleeps no more; the one after it comes up awake."""
        if not self._asleep:
            return
        state = self._state()
        alive = {url: it for url, it in self._asleep.items() if _is_alive(state, url, it)}
        if len(alive) < len(self._asleep):
            self._asleep = alive
            self._write()

    def _state(self) -> FleetState:
        try:
            return read_fleet_state(self._directory)
        except FleetError:
            return FleetState(())  # the fleet has ended, and its engines with it

    @contextmanager
    def _waking(self) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self._note(Span(WAKE, began, self._clock()))

    async def _has_died(self, url: str, error: EngineError) -> bool:
        """Whether its process is gone, so that the fleet starts it again when it may.

        A connection may break for another reason; then the fleet notices no death.
        """
        gave_no_answer = error.status is None and not isinstance(error, RequestTimeoutError)
        if not gave_no_answer or self._serving.max_restarts == 0:
            return False
        for _ in range(round(NOTICED_SECONDS / POLL_SECONDS)):
            if not _is_alive(self._state(), url, self._asleep[url]):
                return True
            await asyncio.sleep(POLL_SECONDS)
        return False

    def _begin_training(self) -> None:
        self._training_since = self._clock()
        self._write()

    def _is_awake(self, url: str) -> None:
        del self._asleep[url]
        self._write()

    def _write(self) -> None:
        engines = {url: sleeper.incarnation for url, sleeper in self._asleep.items()}
        is_training = self._training_since is not None
        write_sleep(self._directory, engines, is_training=is_training)

    def _client(self) -> EngineClient:
        timeout = self._serving.request_timeout_seconds
        return EngineClient(self._endpoints, request_timeout_seconds=timeout, keep_alive=False)


def _is_alive(state: FleetState, url: str, sleeper: _Sleeper) -> bool:
    """Whether it is the process that fell asleep."""
    return state.incarnations(sleeper.model).get(url) == sleeper.incarnation


async def _to_all(calls: Iterable[Awaitable[None]]) -> None:
    """Await all, to the end of each; then raise the first error."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
