"""What pools that only pretend to play have in common."""

from __future__ import annotations

from collections.abc import Mapping

from sod_mcore.rollout.pool import RolloutPool, Ticket
from sod_mcore.serving.client.counters import ClientCounters


class IdlePool(RolloutPool):
    """Reaches no engine, so there is nothing to pause or to close."""

    @property
    def counters(self) -> Mapping[str, ClientCounters]:
        return {}

    def cancel(self, ticket: Ticket) -> None:
        return

    def hear(self) -> None:
        return

    def pause(self, timeout_seconds: float = 60.0) -> None:
        return

    def resume(self, timeout_seconds: float = 60.0) -> None:
        return

    def close(self) -> None:
        return
