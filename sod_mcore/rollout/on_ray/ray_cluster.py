"""The Ray that a run plays on: one of its own on this machine, or a cluster that it joins."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from sod_mcore.config import ConfigError, RolloutConfig
from sod_mcore.ray_cluster.connection import (
    JoinedRay,
    LostClusterError,
    RayConnectionError,
    connected_to_ray,
    joined_ray,
)
from sod_mcore.ray_cluster.settings import usable_cpus
from sod_mcore.rollout.child_environment import single_process_environment
from sod_mcore.rollout.on_ray.local_ray import STOP_SECONDS, kill_session
from sod_mcore.rollout.on_ray.ray_driver import LostRayError
from sod_mcore.rollout.pool import START_TIMEOUT_SECONDS, RolloutError

_LONGEST_FOLDER = 30
"""Characters of a folder in which Ray's sockets get names that the kernel takes (107)."""


@contextmanager
def ray_cluster(rollout: RolloutConfig, run_directory: Path) -> Iterator[Callable[[], None]]:
    """Connect this process to Ray for as long as the context is open.

    Yields:
        a check that raises LostRayError when Ray is gone; may be called from any thread.

    Raises:
        ConfigError: the cluster cannot be joined, or is too small.
        RolloutError: Ray did not start here.
    """
    if rollout.ray_address is not None:
        with joined_ray("rollout.ray_address", rollout.ray_address) as joined:
            _check_size(rollout)
            yield partial(_check, joined)
        return
    local = LocalRay(run_directory / "ray.log")
    try:
        with _environment(local.environment), _connected(local):
            yield local.check
    finally:
        local.close()


def _check(joined: JoinedRay) -> None:
    try:
        joined.check()
    except LostClusterError as error:
        raise LostRayError(str(error)) from error


@contextmanager
def _connected(local: LocalRay) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(connected_to_ray(local.address, local))
        except RayConnectionError as error:
            raise RolloutError(str(error)) from error
        yield


class LocalRay:
    """A Ray on the loopback interface, in a process of ours that removes it at the end.

    Attributes:
        address: where its clients connect.
        environment: variables that clients need before they import Ray.
        is_lost: whether a check has found it gone.
    """

    is_lost = False

    def __init__(self, log_path: Path) -> None:
        """Start it and wait for its address.

        Raises:
            RolloutError: it did not start in time, or ended.
        """
        self._log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(
            prefix="ray_", dir=_folder_for_sockets(), ignore_cleanup_errors=True
        )
        self.environment = {
            "RAY_USAGE_STATS_ENABLED": "0",
            # Whoever else is on this machine cannot run code in it.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # Ray's name for a node that others cannot reach, and so may be on 127.0.0.1.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # By default 15: programs of the model would wait for the engines, and run out of time.
            "RAY_worker_niceness": "0",
        }
        self._connection, theirs = Pipe()
        self._process = self._start(theirs)
        theirs.close()
        self.address = self._receive_address()

    def _start(self, theirs: Connection) -> subprocess.Popen[bytes]:
        folder = self._temporary.name
        command = [sys.executable, "-m", "sod_mcore.rollout.on_ray.local_ray", str(theirs.fileno())]
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                [*command, folder, str(usable_cpus())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**single_process_environment(), **self.environment, "TMPDIR": folder},
                start_new_session=True,  # Ctrl-C is the trainer's to handle; Ray follows it
            )

    def _receive_address(self) -> str:
        try:
            if self._connection.poll(START_TIMEOUT_SECONDS):
                return str(self._connection.recv())
            problem = f"did not start within {START_TIMEOUT_SECONDS:.0f} s"
        except (EOFError, ConnectionResetError):
            problem = "did not start"
        self.close()
        raise RolloutError(f"Ray {problem}; its log is {self._log_path}")

    def check(self) -> None:
        """Whether it still runs.

        Raises:
            LostRayError: it does not.
        """
        code = self._process.poll()
        if code is not None:
            self.is_lost = True
            raise LostRayError(
                f"the Ray of this run ended with exit code {code}; its log is {self._log_path}"
            )

    def close(self) -> None:
        """Stop it: closing the pipe asks for that, a kill follows if it does not."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        kill_session(self._process.pid)
        self._process.wait()
        self._temporary.cleanup()


def _folder_for_sockets() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _LONGEST_FOLDER else "/tmp"


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_size(rollout: RolloutConfig) -> None:
    import ray

    wanted = rollout.ray_actors * rollout.ray_actor_cpus
    there = ray.cluster_resources().get("CPU", 0.0)
    if wanted > there:
        raise ConfigError(
            f"rollout.ray_actors={rollout.ray_actors} with rollout.ray_actor_cpus="
            f"{rollout.ray_actor_cpus:g} each reserve {wanted:g} CPUs; the Ray cluster has "
            f"{there:g}: lower one of them, or add nodes"
        )
