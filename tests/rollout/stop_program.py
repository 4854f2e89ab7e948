"""Opens a pool of Ray actors and says which signals still reach this process as they should.

    python -m tests.rollout.stop_program DIRECTORY training|evaluation

As in training, the pool is opened in the main thread and signals are heard by StopRequest; or, as
in evaluation, it is opened in another thread, and signals are heard by the main thread's loop.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from sod_mcore.loop.stop import StopRequest
from sod_mcore.rollout.open_pool import open_pool
from tests.rollout.input_engine import pool_settings

PATIENCE = 30.0


def train(directory: Path) -> None:
    before = caught_signals()
    with open_pool(pool_settings(directory, {"pool": "ray"})):
        assert caught_signals() == before, "Ray has taken a stop signal"
        stop = StopRequest(directory / "stop", grace_seconds=600.0)
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while stop.reason is None and time.monotonic() < deadline:
            time.sleep(0.01)
        print(f"heard {stop.reason}", flush=True)
    print("closed", flush=True)


async def evaluate(directory: Path) -> None:
    heard = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, heard.set)

    def work() -> None:
        with open_pool(pool_settings(directory, {"pool": "ray"})):
            os.kill(os.getpid(), signal.SIGTERM)

    await asyncio.to_thread(work)
    await asyncio.wait_for(heard.wait(), PATIENCE)
    print("heard SIGTERM", flush=True)
    heard.clear()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(heard.wait(), PATIENCE)
    print("closed", flush=True)


def caught_signals() -> set[signal.Signals]:
    """Stop signals that do not have their default effect, whoever has set that."""
    lines = Path("/proc/self/status").read_text().splitlines()
    masks = dict(line.split(":\t") for line in lines if line.startswith("Sig"))
    caught = int(masks["SigCgt"], 16) | int(masks["SigIgn"], 16)
    stop = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    return {number for number in stop if caught >> (number - 1) & 1}


if __name__ == "__main__":
    if sys.argv[2] == "training":
        train(Path(sys.argv[1]))
    else:
        asyncio.run(evaluate(Path(sys.argv[1])))
