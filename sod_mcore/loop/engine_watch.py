"""Which engines are there, and whether one of them was started again and waits for its weights.

The fleet restarts an engine that died; it comes back with the weights of its ``model_path``, under
its address or, on a Ray cluster, under another. The rollout pool does not use it until it reports
the version that it asks for, and the trainer, which alone has that version, sends it once more.
What this machine's fleet started is known from its state; other engines (addresses, other nodes)
are asked for their version.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sod_mcore.serving.endpoints import Endpoints, FleetError, ModelEndpoints, engines_now
from sod_mcore.serving.fleet.state import FleetState, read_fleet_state
from sod_mcore.serving.weights.update import reported_versions

POLL_SECONDS = 0.5
ASK_EVERY_SECONDS = 5.0
"""Pause between two questions to engines whose state is not known here."""
ASK_SECONDS = 2.0


@dataclass(frozen=True)
class _Holders:
    """Who got a version of the weights.

    Attributes:
        version: of the weights.
        incarnations: which process each engine of ours was.
        others: engines whose state is not known here.
    """

    version: int
    incarnations: Mapping[str, int]
    others: tuple[str, ...]


class EngineWatch:
    """The trainer's view of the engines that get its weights; used by global rank 0.

    Args:
        directory: the folder that the fleet serves from.
        patience_seconds: longest wait for an engine of a model that has none left.
        should_stop: ends that wait.
    """

    def __init__(
        self,
        directory: Path,
        patience_seconds: float,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._directory = directory
        self._patience_seconds = patience_seconds
        self._should_stop = should_stop
        self._holders: dict[str, _Holders] = {}
        self._next_question = 0.0
        self._others_lack_weights = False
        self._restarts_before = self._count_restarts(0)

    def begin_update(self, endpoints: Endpoints, model: str, version: int) -> Endpoints | None:
        """The fleet with those engines of ``model`` that are there; waits until one is.

        From now on they count as having ``version``, and nobody else. None if the run is to stop
        before any is there.

        Raises:
            FleetError: none was there in time, or all have died too often.
        """
        deadline = time.monotonic() + self._patience_seconds
        while True:
            state = self._state()
            served = self._where_it_is_now(endpoints.model(model))
            present = _present_engines(state, served)
            if present:
                others = tuple(set(present) - _urls(state, served.name))
                self._holders[model] = _Holders(version, state.incarnations(model), others)
                self._others_lack_weights = False
                now = dataclasses.replace(served, engines=present)
                return dataclasses.replace(endpoints, models={**endpoints.models, model: now})
            if self._should_stop():
                return None
            self._refuse_to_wait(state, served, deadline)
            time.sleep(POLL_SECONDS)

    def is_weightless(self) -> bool:
        """Whether an engine is there that does not have the weights that were last sent."""
        state = self._state()
        ours = any(
            holders.incarnations.get(url) != incarnation
            for model, holders in self._holders.items()
            for url, incarnation in state.incarnations(model).items()
        )
        return ours or self._do_others_lack_weights()

    def restarts(self) -> int:
        """How often a process of the fleet was started again since this watch was made."""
        return self._count_restarts(self._restarts_before) - self._restarts_before

    def _where_it_is_now(self, served: ModelEndpoints) -> ModelEndpoints:
        """The fleet may have started an engine again elsewhere."""
        urls = engines_now(self._directory, served.name)
        return dataclasses.replace(served, engines=urls) if urls else served

    def _do_others_lack_weights(self) -> bool:
        if time.monotonic() >= self._next_question:
            self._next_question = time.monotonic() + ASK_EVERY_SECONDS
            self._others_lack_weights = any(
                version is not None and version < holders.version
                for holders in self._holders.values()
                for version in reported_versions(holders.others, ASK_SECONDS).values()
            )
        return self._others_lack_weights

    def _refuse_to_wait(self, state: FleetState, served: ModelEndpoints, deadline: float) -> None:
        where = f"; the logs are in {self._directory / 'serving'}"
        conditions = {s.state for s in state.servers if s.url in served.engines}
        if conditions == {"given up"}:
            raise FleetError(f"every engine of {served.name} has died too often{where}")
        if time.monotonic() > deadline:
            raise FleetError(
                f"no engine of {served.name} was ready within serving.restart_timeout_seconds="
                f"{self._patience_seconds:g}; raise it where a start takes longer{where}"
            )

    def _count_restarts(self, default: int) -> int:
        servers = self._state().servers
        return sum(server.restarts for server in servers) if servers else default

    def _state(self) -> FleetState:
        """Nothing is known of engines of others, nor of a fleet that has just ended."""
        try:
            return read_fleet_state(self._directory)
        except FleetError:
            return FleetState(())


def _present_engines(state: FleetState, served: ModelEndpoints) -> tuple[str, ...]:
    """Ours that are ready, and others that answer."""
    ready = state.incarnations(served.name)
    unknown = [url for url in served.engines if url not in _urls(state, served.name)]
    answers = reported_versions(unknown, ASK_SECONDS)
    return tuple(u for u in served.engines if u in ready or answers.get(u) is not None)


def _urls(state: FleetState, model: str) -> set[str]:
    return {s.url for s in state.servers if s.role == "engine" and s.model == model}
