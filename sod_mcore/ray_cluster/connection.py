"""This process as a client of Ray.

Ray would take the stop signals of the process that it is loaded into; they are kept. A process can
use one Ray in its life, since Ray reads addresses and secrets from the environment when it is first
imported.
"""

from __future__ import annotations

import atexit
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol

from sod_mcore.config import ConfigError
from sod_mcore.outcome import EXIT_FAILED
from sod_mcore.platform.early_leave import leave_early
from sod_mcore.platform.signal_actions import kept_signal_actions
from sod_mcore.ray_cluster.daemon_threads import call_in_thread
from sod_mcore.ray_cluster.settings import AUTO

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
CONNECT_SECONDS = 180.0
"""Until Ray takes the connection."""
MISSES = 3
"""Checks in a row that fail before a cluster counts as lost."""

_DISCONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 5.0
"""For a connection to a cluster that was joined."""


class RayConnectionError(Exception):
    """Ray does not take the connection; the message is in its words."""


class LostClusterError(Exception):
    """The cluster is gone: nothing may be asked of it any more."""


class Cluster(Protocol):
    """What a connection must know of a Ray before it ends.

    Attributes:
        is_lost: whether a check has found it gone.
    """

    is_lost: bool


class JoinedRay:
    """A cluster of others.

    Attributes:
        address: of the cluster, host:port; known once this process has joined it.
        is_lost: whether checks have found it gone.
    """

    def __init__(self) -> None:
        self.address = ""
        self.is_lost = False
        self._num_misses = 0

    def check(self) -> None:
        """Whether it still answers; may be called from any thread.

        Raises:
            LostClusterError: it did not, several times in a row.
        """
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
        except OSError as error:
            self._num_misses += 1
            if self._num_misses >= MISSES:
                self.is_lost = True
                raise LostClusterError(
                    f"the Ray cluster at {self.address} does not answer any more: {error}"
                ) from error
        else:
            self._num_misses = 0


@contextmanager
def joined_ray(field: str, address: str) -> Iterator[JoinedRay]:
    """This process as a client of a cluster of others.

    Args:
        field: the setting that names it.
        address: host:port or auto.

    Raises:
        ConfigError: it cannot be joined.
    """
    joined = JoinedRay()
    with ExitStack() as stack:
        try:
            stack.enter_context(connected_to_ray(address, joined))
        except RayConnectionError as error:
            raise ConfigError(
                f"{field} is {address}: {error}; start the cluster with this machine as one of its "
                "nodes (docs/ray.md), or correct the address"
            ) from error
        import ray

        joined.address = ray.get_runtime_context().gcs_address
        yield joined


@contextmanager
def connected_to_ray(address: str, cluster: Cluster) -> Iterator[None]:
    """This process as a client of Ray; it leaves Ray alone at the end if that is lost.

    One that is a client of the same cluster already stays one: the fleet of an evaluation and its
    rollouts are one process.

    Raises:
        RayConnectionError: the connection failed, or is another's.
    """
    hook = sys.excepthook
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        present = ray.get_runtime_context().gcs_address
        if address not in (AUTO, present):
            message = f"this process uses the Ray cluster at {present} already, and can use one"
            raise RayConnectionError(message)
        yield
        return
    sys.excepthook = hook  # Ray's tells Ray of an error, and waits for it if it is gone

    def connect() -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray.init(address=address, log_to_driver=False, configure_logging=False)

    try:
        with kept_signal_actions(STOP_SIGNALS):
            # In the main thread, Ray would set Python's handler of SIGTERM as well.
            call_in_thread(connect, "ray-connect").result(CONNECT_SECONDS)
    except TimeoutError as error:
        raise RayConnectionError(f"Ray did not answer within {CONNECT_SECONDS:.0f} s") from error
    except (OSError, RayError, RuntimeError, ValueError) as error:
        message = f"Ray does not take the connection: {one_line(error)}"
        raise RayConnectionError(message) from error
    try:
        yield
    finally:
        if cluster.is_lost:
            # Calls would wait for what is gone, until Ray ends this process after a minute.
            atexit.unregister(ray.shutdown)
            leave_early(EXIT_FAILED)
        else:
            with kept_signal_actions(STOP_SIGNALS), suppress(TimeoutError):
                call_in_thread(ray.shutdown, "ray-disconnect").result(_DISCONNECT_SECONDS)


def one_line(error: BaseException) -> str:
    """The first words of what Ray says, which may be pages."""
    return " ".join(str(error).split())[:500]
