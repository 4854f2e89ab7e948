"""The Ray that a run plays on: one of its own on this machine, or a cluster that it joins.

Ray would take the stop signals of the process that it is loaded into; they are kept. A process can
use one Ray in its life, since Ray reads addresses and secrets from the environment when it is first
imported.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from sod_mcore.config import ConfigError, RolloutConfig
from sod_mcore.outcome import EXIT_FAILED
from sod_mcore.platform.early_leave import leave_early
from sod_mcore.platform.signal_actions import kept_signal_actions
from sod_mcore.rollout.child_environment import single_process_environment
from sod_mcore.rollout.daemon_threads import call_in_thread
from sod_mcore.rollout.local_ray import STOP_SECONDS, kill_session
from sod_mcore.rollout.open_pool import usable_cpus
from sod_mcore.rollout.pool import START_TIMEOUT_SECONDS, RolloutError
from sod_mcore.rollout.ray_driver import MISSES, LostRayError

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_LONGEST_FOLDER = 30
"""Characters of a folder in which Ray's sockets get names that the kernel takes (107)."""

_DISCONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 5.0
"""For a connection to a cluster that was joined."""


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
        joined = JoinedRay()
        with _joined(rollout.ray_address, joined):
            _check_size(rollout)
            yield joined.check
        return
    local = LocalRay(run_directory / "ray.log")
    try:
        with _environment(local.environment), _connected(local.address, local):
            yield local.check
    finally:
        local.close()


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
        }
        self._connection, theirs = Pipe()
        self._process = self._start(theirs)
        theirs.close()
        self.address = self._receive_address()

    def _start(self, theirs: Connection) -> subprocess.Popen[bytes]:
        folder = self._temporary.name
        command = [sys.executable, "-m", "sod_mcore.rollout.local_ray", str(theirs.fileno())]
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
        """Whether it still answers.

        Raises:
            LostRayError: it did not, several times in a row.
        """
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
        except OSError as error:
            self._num_misses += 1
            if self._num_misses >= MISSES:
                self.is_lost = True
                raise LostRayError(
                    f"the Ray cluster at {self.address} does not answer any more: {error}"
                ) from error
        else:
            self._num_misses = 0


@contextmanager
def _joined(address: str, joined: JoinedRay) -> Iterator[None]:
    """This process as a client of a cluster."""
    with ExitStack() as stack:
        try:
            stack.enter_context(_connected(address, joined))
        except RolloutError as error:
            raise ConfigError(
                f"rollout.ray_address is {address}: {error}; start the cluster with this machine "
                "as one of its nodes (docs/ray.md), or correct the address"
            ) from error
        import ray

        joined.address = ray.get_runtime_context().gcs_address
        yield


@contextmanager
def _connected(address: str, cluster: LocalRay | JoinedRay) -> Iterator[None]:
    """This process as a client of Ray; it leaves Ray alone at the end if that is lost.

    Raises:
        RolloutError: the connection failed, in Ray's words.
    """
    hook = sys.excepthook
    import ray
    from ray.exceptions import RayError

    sys.excepthook = hook  # Ray's tells Ray of an error, and waits for it if it is gone

    def connect() -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray.init(address=address, log_to_driver=False, configure_logging=False)

    try:
        with kept_signal_actions(STOP_SIGNALS):
            # In the main thread, Ray would set Python's handler of SIGTERM as well.
            call_in_thread(connect, "ray-connect").result(START_TIMEOUT_SECONDS)
    except TimeoutError as error:
        raise RolloutError(f"Ray did not answer within {START_TIMEOUT_SECONDS:.0f} s") from error
    except (OSError, RayError, RuntimeError, ValueError) as error:
        raise RolloutError(f"Ray does not take the connection: {one_line(error)}") from error
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


def one_line(error: BaseException) -> str:
    """The first words of what Ray says, which may be pages."""
    return " ".join(str(error).split())[:500]
