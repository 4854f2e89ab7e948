"""Plays batches as a run's rank 0 does, in a process of its own that a test can kill.

    python -m tests.rollout.pool_program DIRECTORY ROLLOUT-SETTINGS-AS-JSON

It submits three batches behind a closed gate, collects them, writes them to DIRECTORY, says
"played", and waits until standard input ends.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sod_mcore.rollout.open_pool import check_pool, open_pool
from sod_mcore.trajectory import RecordedBatch
from tests.rollout.input_engine import pool_settings, sums

DEADLINE_SECONDS = 300.0
BATCHES = (sums(6), sums(4, samples=3), sums(3, samples=1, with_teacher=False, is_urgent=True))


def main() -> None:
    """Play, save, wait."""
    directory, rollout = Path(sys.argv[1]), json.loads(sys.argv[2])
    settings = pool_settings(directory, rollout)
    check_pool(settings.rollout)
    with open_pool(settings) as pool:
        pool.pause()  # so that all batches are there when the first conversation begins
        tickets = [pool.submit(request) for request in BATCHES]
        pool.resume()
        for number, ticket in enumerate(tickets):
            result = pool.collect(ticket, DEADLINE_SECONDS)
            batch = RecordedBatch(result.trajectories, number, 0, result.num_dropped)
            batch.save(directory / f"batch_{number}.npz")
        print("played", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
