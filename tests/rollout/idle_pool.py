"""What pools that only pretend to play have in common."""

from __future__ import annotations

from sod_mcore.rollout.pool import RolloutPool


class IdlePool(RolloutPool):
    """Reaches no engine, so there is nothing to pause or to close."""

    def pause(self, timeout_seconds: float = 60.0) -> None:
        return

    def resume(self, timeout_seconds: float = 60.0) -> None:
        return

    def close(self) -> None:
        return
