"""Finds the processes of a run's fleet, to do something to them."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]

from sod_mcore.serving.fleet_state import ServerState, read_fleet_state
from tests.end_to_end.drills import Drill


def server(it: Drill, name: str) -> ServerState:
    """The state of one process of the fleet."""
    servers = read_fleet_state(it.run_directory).servers
    return next(each for each in servers if each.name == name)


def process_of(it: Drill, state: ServerState) -> psutil.Process:
    """The process that was started for a server: its port is in the command line."""
    port = state.url.rpartition(":")[2]
    found = [p for p in it.members() if "--port" in p.cmdline() and port in p.cmdline()]
    return min(found, key=lambda process: process.create_time())
