"""What can be wrong with the settings of a Ray cluster, found before anything is started."""

from __future__ import annotations

import importlib.util
import os
import socket
from urllib.parse import urlsplit

from sod_mcore.config import ConfigError

AUTO = "auto"
"""The cluster that this machine is a node of."""
_REACHABLE_SECONDS = 5.0


def check_installed(field: str, otherwise: str) -> None:
    """Refuse Ray where it is not installed.

    Args:
        field: the setting that asks for Ray.
        otherwise: the setting that does without, as ``field=value``.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            f"{field} is ray, but the package ray is not installed; pip install 'sod_mcore[ray]', "
            f"or set {otherwise}"
        )


def check_address(field: str, address: str, allowed: str) -> None:
    """Refuse an address at which no cluster can be; ``auto`` is looked up when it is joined.

    Args:
        field: the setting.
        address: its value.
        allowed: what else may stand there, such as "auto, or null".

    Raises:
        ConfigError: it is not host:port, or nothing answers there.
    """
    if address == AUTO:
        return
    if "://" in address:
        raise ConfigError(
            f"{field} is {address}, which is not the cluster's own address; give host:port as "
            "`ray start --head` prints it (port 6379), or auto"
        )
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None:
        raise ConfigError(f"{field} is {address}; give host:port, {allowed}")
    try:
        socket.create_connection((host, port), timeout=_REACHABLE_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"{field} is {address}, where nothing answers ({error}); start the cluster "
            "(docs/ray.md), or correct the address"
        ) from error


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
