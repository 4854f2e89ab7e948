"""Weights by broadcast through a process group of rank 0 and the engines; nothing is encoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.endpoints import ModelEndpoints
from sod_mcore.serving.weights.kept_groups import KeptGroups
from sod_mcore.serving.weights.prefetch import prefetched
from sod_mcore.serving.weights.receivers import close_receivers, open_receivers
from sod_mcore.serving.weights.tensor_check import Bucket, checked_buckets, engine_shapes


@dataclass(frozen=True)
class DistributedTransfer:
    """The whole model's tensors, in buckets.

    Attributes:
        buckets: consumed once. While one is sent, the next one is made.
        groups: keeps the group for the next update.
    """

    buckets: Iterable[Bucket]
    groups: KeptGroups

    def check(self, endpoints: ModelEndpoints) -> None:
        """Refuse engines whose folder cannot be read; see :func:`engine_shapes`."""
        engine_shapes(endpoints)

    async def send(
        self, client: EngineClient, endpoints: ModelEndpoints, version: int, *, flush_cache: bool
    ) -> None:
        """Give each bucket to every engine before the next one is sent.

        Raises:
            EngineError: an engine refused, is gone or did not answer; its weights may be of two
                versions.
            WeightUpdateError: a tensor does not fit the engine, or one is missing at the end.
        """
        receivers = await open_receivers(client, endpoints.engines)
        async with self.groups.group(client, endpoints.name, receivers) as group:
            with prefetched(checked_buckets(self.buckets, engine_shapes(endpoints))) as buckets:
                for bucket in buckets:
                    await group.broadcast(client, bucket)
            # An empty bucket closes the update: only now has an engine the whole of the version.
            await group.broadcast(client, [], version, flush_cache=flush_cache)
        await close_receivers(client, receivers)
