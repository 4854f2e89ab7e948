"""Finds the processes of a run's fleet, to do something to them."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]

from sod_mcore.serving.fleet.state import ServerState, read_fleet_state
from tests.end_to_end.drills import Drill


def server(it: Drill, name: str) -> ServerState:
    """The state of one process of the fleet."""
    servers = read_fleet_state(it.run_directory).servers
    return next(each for each in servers if each.name == name)


def process_of(state: ServerState) -> psutil.Process:
    """The process that listens on a server's port; the router hides its command line."""
    port = int(state.url.rpartition(":")[2])
    (pid,) = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    return psutil.Process(pid)
