"""A real Ray on this machine, to which tests add nodes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def started_cluster(head: Mapping[str, Any]) -> Iterator[Any]:
    """Ray's ``Cluster`` with this head; all that it has begun is gone at the end."""
    folder = tempfile.TemporaryDirectory(prefix="ray_", dir="/tmp", ignore_cleanup_errors=True)
    with folder as name, pytest.MonkeyPatch.context() as patch:
        # Read when Ray is first imported, which is here, and by the programs that tests start.
        patch.setenv("RAY_TMPDIR", name)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args=dict(head))
        try:
            yield cluster
        finally:
            cluster.shutdown()
