"""Which engines are there, and whether one of them was started again and waits for its weights.

The fleet restarts an engine that died; it comes back under its address with the weights of its
``model_path``. The rollout pool does not use it until it reports the version that it asks for, and
the trainer, which alone has that version, sends it once more.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

from sod_mcore.serving.fleet import Endpoints, FleetError, ModelEndpoints
from sod_mcore.serving.fleet_state import FleetState, read_fleet_state

POLL_SECONDS = 0.5


class EngineWatch:
    """The trainer's view of the engines that get its weights; used by global rank 0.

    Args:
        directory: the folder that the fleet serves from.
        patience_seconds: longest wait for an engine of a model that has none left.
    """

    def __init__(self, directory: Path, patience_seconds: float) -> None:
        self._directory = directory
        self._patience_seconds = patience_seconds
        self._holders: dict[str, Mapping[str, int]] = {}

    def begin_update(self, endpoints: Endpoints, model: str) -> Endpoints:
        """The fleet with those engines of ``model`` that are ready; waits until there is one.

        From now on they count as having the weights, and nobody else.

        Raises:
            FleetError: none was ready in time.
        """
        served, deadline = endpoints.model(model), time.monotonic() + self._patience_seconds
        while True:
            state = self._state()
            ready = _ready_engines(state, served)
            if ready:
                self._holders[model] = state.incarnations(model)
                now = dataclasses.replace(served, engines=ready)
                return dataclasses.replace(endpoints, models={**endpoints.models, model: now})
            if time.monotonic() > deadline:
                raise FleetError(
                    f"no engine of {model} was ready within serving.restart_timeout_seconds="
                    f"{self._patience_seconds:g}; the logs are in {self._directory / 'serving'}"
                )
            time.sleep(POLL_SECONDS)

    def is_weightless(self) -> bool:
        """Whether an engine is ready that did not get the weights when they were last sent."""
        state = self._state()
        return any(
            holders.get(url) != incarnation
            for model, holders in self._holders.items()
            for url, incarnation in state.incarnations(model).items()
        )

    def restarts(self) -> int:
        """How often a process of the fleet was started again."""
        return sum(server.restarts for server in self._state().servers)

    def _state(self) -> FleetState:
        """Nothing is known of engines of others, nor of a fleet that has just ended."""
        try:
            return read_fleet_state(self._directory)
        except FleetError:
            return FleetState(())


def _ready_engines(state: FleetState, served: ModelEndpoints) -> tuple[str, ...]:
    ours = {server.url for server in state.servers if server.role == "engine"}
    ready = state.incarnations(served.name)
    return tuple(url for url in served.engines if url in ready or url not in ours)
