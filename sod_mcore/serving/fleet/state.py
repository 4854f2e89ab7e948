"""What became of the fleet's processes since its start: ``serving/state.json``.

It tells people what happens, and the trainer that an engine is another process than before: one
that was started again has the weights of its ``model_path`` and none of the trainer's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sod_mcore.files import write_text
from sod_mcore.serving.endpoints import FleetError

POLL_SECONDS = 0.5
NOTICED_SECONDS = 3.0
"""After it the fleet has noticed a death, for which it looks every half second."""

Role = Literal["engine", "router"]
Condition = Literal["starting", "ready", "restarting", "given up"]


@dataclass(frozen=True)
class ServerState:
    """One process of the fleet.

    Attributes:
        name: what people call it, such as "student_engine_1"; also the name of its log.
        model: the model that it serves.
        role: "engine" or "router".
        url: base URL, the same after a restart; "" while none was found.
        state: "restarting" lasts from a death until requests are answered again; what is "given
            up" died too often, and the fleet ends.
        restarts: how often it was started again.
        changed_at: Unix time in seconds of the last change.
        visible_gpus: CUDA_VISIBLE_DEVICES of an engine; None where it is not known, or all are.
    """

    name: str
    model: str
    role: Role
    url: str
    state: Condition
    restarts: int
    changed_at: float
    visible_gpus: str | None = None

    @property
    def incarnation(self) -> int:
        """Number of the process under this name, counted from 1."""
        return self.restarts + 1


@dataclass(frozen=True)
class FleetState:
    """The processes that a fleet has started; engines of others are none of them."""

    servers: tuple[ServerState, ...]

    def incarnations(self, model: str) -> Mapping[str, int]:
        """By base URL, which process each engine of ``model`` is; engines that are ready only.

        An engine whose number has grown has lost the weights that were sent to it.
        """
        return {
            server.url: server.incarnation
            for server in self.servers
            if server.model == model and server.role == "engine" and server.state == "ready"
        }


def state_path(directory: Path) -> Path:
    """The file; ``directory`` is ``run.directory`` or ``serving.directory``."""
    return directory / "serving" / "state.json"


def read_fleet_state(directory: Path) -> FleetState:
    """Read the state of the fleet that serves from ``directory``.

    Raises:
        FleetError: there is none, or another version of this package wrote it.
    """
    path = state_path(directory)
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
        return FleetState(tuple(ServerState(**fields) for fields in tree["servers"]))
    except FileNotFoundError:
        raise FleetError(f"no fleet runs from {directory}: {path} does not exist") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FleetError(
            f"{path} was not written by this version of sod_mcore ({error})"
        ) from error


def wait_for_restarts(directory: Path, timeout_seconds: float) -> None:
    """Wait until no process of the fleet is being started again; nothing to do without a fleet.

    Raises:
        FleetError: one still is at the end of that time.
    """
    deadline = time.monotonic() + timeout_seconds
    while names := _restarting(directory):
        if time.monotonic() > deadline:
            raise FleetError(
                f"{', '.join(names)}: died, and not ready again within {timeout_seconds:g} s; "
                f"start the run when it is; the logs are in {state_path(directory).parent}"
            )
        time.sleep(POLL_SECONDS)


def _restarting(directory: Path) -> list[str]:
    try:
        servers = read_fleet_state(directory).servers
    except FleetError:
        return []  # whoever needs the fleet will miss it
    return [server.name for server in servers if server.state == "restarting"]


class FleetStateFile:
    """Writes the file at every change, so that a reader sees the old content or the new.

    Args:
        directory: ``run.directory`` or ``serving.directory``.
    """

    def __init__(self, directory: Path) -> None:
        self._path = state_path(directory)
        self._servers: dict[str, ServerState] = {}

    def record(
        self,
        name: str,
        model: str,
        role: Role,
        url: str,
        state: Condition,
        restarts: int,
        *,
        visible_gpus: str | None = None,
    ) -> None:
        """Write what has become of one process."""
        now = time.time()
        self._servers[name] = ServerState(
            name, model, role, url, state, restarts, now, visible_gpus
        )
        servers = sorted(self._servers.values(), key=lambda server: server.name)
        write_text(self._path, json.dumps(asdict(FleetState(tuple(servers))), indent=2))

    def remove(self) -> None:
        """Remove the file at an orderly end; it stays where it tells why the fleet gave up.

        The file of a fleet that serves from here already, and therefore refused this one, stays.
        """
        states = {server.state for server in self._servers.values()}
        if states and "given up" not in states:
            self._path.unlink(missing_ok=True)
