"""A Ray for one run on one machine: ``python -m ...on_ray.local_ray FD FOLDER CPUS``.

``ray_cluster.py`` starts it in a session of its own and hears Ray's address over a pipe. It keeps
Ray's processes and files for as long as the pipe is open, and removes them then, so that nothing is
left of a run that is killed. It ends when Ray does. It imports nothing of ours, nor Ray: it is one
more process, and should be small.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

STOP_SECONDS = 5.0
"""Until everything is gone."""
_POLL_SECONDS = 0.1


def main() -> None:
    """Start Ray, say where it is, wait for the end of the run or of Ray, leave nothing."""
    connection, folder, cpus = Connection(int(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
    ray = subprocess.Popen(_command(folder, cpus), stdin=subprocess.DEVNULL)
    try:
        address = _wait_for_address(ray, folder / "ray_current_cluster", connection)
        if address is not None:
            connection.send(address)
            while ray.poll() is None and not _has_ended(connection):
                time.sleep(_POLL_SECONDS)
        code = ray.poll()
    finally:
        # Not in order: that takes Ray up to 30 s, and saves nothing that is wanted.
        kill_session(os.getsid(0))
        shutil.rmtree(folder, ignore_errors=True)
    if code is not None:
        sys.exit(f"ray start ended with exit code {code}")


def _command(folder: Path, cpus: str) -> list[str]:
    """Ray's own command: it ends when one of Ray's processes does."""
    options = ["--head", "--block", "--node-ip-address=127.0.0.1", "--port=0", "--num-gpus=0"]
    options += ["--include-dashboard=false", "--disable-usage-stats"]
    program = [sys.executable, "-m", "ray.scripts.scripts", "start"]
    return [*program, *options, f"--num-cpus={cpus}", f"--temp-dir={folder}"]


def _wait_for_address(
    ray: subprocess.Popen[bytes], file: Path, connection: Connection
) -> str | None:
    """What Ray writes when it has started; None if it, or the run, ends before."""
    while ray.poll() is None and not _has_ended(connection):
        if file.exists() and (address := file.read_text().strip()):
            return address
        time.sleep(_POLL_SECONDS)
    return None


def _has_ended(connection: Connection) -> bool:
    """Whether the run has closed its end of the pipe, through which it sends nothing."""
    return connection.poll()


def kill_session(session: int) -> None:
    """End every process of a session but this one: Ray's workers outlive the rest of Ray."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(folder.name)) == session:
                    os.kill(int(folder.name), signal.SIGKILL)


if __name__ == "__main__":
    main()
