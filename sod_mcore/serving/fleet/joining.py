"""One fleet out of several: waits for the fleets of single nodes, and names their engines.

On several nodes each engine node runs ``python -m sod_mcore.serving`` with a folder of its own in
``serving.directory``. One more such process, with all their engines as ``serving.*.addresses``,
routes to all of them; ``scripts/slurm/nodes.sh`` starts it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from sod_mcore.config import serving_field
from sod_mcore.serving.endpoints import Endpoints, FleetError, endpoints_path, read_endpoints

POLL_SECONDS = 0.5


def wait_for_fleets(directories: Sequence[Path], timeout_seconds: float) -> list[Endpoints]:
    """The addresses of the fleets of ``directories``, once all of them are ready.

    A fleet is ready when its file is there: it is written after every engine has answered, and
    renamed into place. On a network file system it may appear here with a delay.

    Raises:
        FleetError: a file did not appear in time, or cannot be used.
    """
    deadline = time.monotonic() + timeout_seconds
    while missing := [d for d in directories if not endpoints_path(d).exists()]:
        if time.monotonic() > deadline:
            raise FleetError(
                f"{len(missing)} of {len(directories)} fleets are not ready after "
                f"{timeout_seconds:g} s; the first is that of {missing[0]}, whose folder serving/ "
                "holds the engines' logs"
            )
        time.sleep(POLL_SECONDS)
    return [read_endpoints(directory) for directory in directories]


def address_settings(fleets: Sequence[Endpoints]) -> list[str]:
    """``serving.student.addresses=[...]`` and so on for each model, with the engines of all fleets.

    Raises:
        FleetError: the fleets do not serve the same models.
    """
    names = {tuple(sorted(fleet.models)) for fleet in fleets}
    if len(names) > 1:
        raise FleetError(f"the fleets serve different models: {sorted(names)}; use one CONFIG")
    return [
        f"{serving_field(name)}.addresses="
        + json.dumps([url for fleet in fleets for url in fleet.models[name].engines])
        for name in sorted(fleets[0].models)
    ]
