"""A Ray of several nodes on one machine, each with an address of its own, and what runs on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from sod_mcore.serving.endpoints import process_start_ticks
from sod_mcore.serving.fleet import watchdog
from tests.ray_cluster.clusters import started_cluster
from tests.serving.processes import Process, leader_at

HEAD = "127.0.0.1"
WORKERS = ("127.0.0.2", "127.0.0.3")
CPUS, GPUS = 2, 2
"""Of each worker; the head has no GPU."""


@contextmanager
def nodes_on_loopback() -> Iterator[Any]:
    """The head and two workers, which Ray believes to have two GPUs each."""
    head = {"num_cpus": 1, "node_ip_address": HEAD, "include_dashboard": False}
    with started_cluster(head) as cluster:
        for host in WORKERS:
            add_node(cluster, host)
        yield cluster


def add_node(cluster: Any, host: str) -> None:
    """Another worker."""
    options = {"num_cpus": CPUS, "num_gpus": GPUS, "include_dashboard": False}
    cluster.add_node(node_ip_address=host, **options)


def kill_node(cluster: Any, host: str) -> None:
    """As if its machine had lost its power: nothing of Ray's is ended in order."""
    (node,) = [node for node in cluster.worker_nodes if node.node_ip_address == host]
    cluster.remove_node(node, allow_graceful=False)


def engine_at(url: str) -> int:
    """The leader of the engine's process group, which an actor on some node has started."""
    return leader_at(os.getpid(), url)


def actor_of(pid: int) -> int:
    """The process of the actor that has started an engine."""
    parent = psutil.Process(pid).parent()
    assert "EngineActor" in parent.cmdline()[0], parent.cmdline()
    return int(parent.pid)


def environment_of(pid: int) -> dict[str, str]:
    """With which a process was started."""
    return dict(psutil.Process(pid).environ())


def left_of(folder: Path) -> set[Process]:
    """Engines and routers of the fleet of ``folder``, and watchdogs of actors."""
    return watchdogs_of_actors() | _with_words(lambda words: any(str(folder) in w for w in words))


def watchdogs_of_actors() -> set[Process]:
    """They are nobody's children."""
    wanted = [watchdog.__file__, watchdog.DETACHED]
    return _with_words(lambda words: words[-2:] == wanted)


def _with_words(are_wanted: Callable[[list[str]], bool]) -> set[Process]:
    """The processes whose command lines are wanted."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if are_wanted(process.cmdline()):
                start = process_start_ticks(process.pid)
                found |= set() if start is None else {(process.pid, start)}
    return found
