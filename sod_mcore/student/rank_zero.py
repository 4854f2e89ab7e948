"""Work that global rank 0 does for all: the result, or the failure, reaches every rank.

Rollouts, rewards and weight sync happen on rank 0 while the others wait. They wait on a gloo
broadcast with the rollout's deadline, never inside a device collective, and a failure on rank 0
ends all of them at once instead of leaving them to time out.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from sod_mcore.student.exchange import broadcast_from_rank0

Result = TypeVar("Result")


class RankZeroError(RuntimeError):
    """Global rank 0 failed; its own output tells why."""


def on_rank_zero(
    work: Callable[[], Result], group: dist.ProcessGroup, timeout: timedelta | None = None
) -> Result:
    """Run ``work`` on global rank 0 and return its result on every rank of ``group``.

    Args:
        timeout: longest time that ``work`` may take; None leaves it that of a collective.

    Raises:
        RankZeroError: on the other ranks, when ``work`` raised on rank 0 (which re-raises).
    """
    outcome: tuple[Result | None, str | None] | None = None
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome = (work(), None)
        except Exception as error:
            failure = error
            outcome = (None, f"{type(error).__name__}: {error}")
    result, message = broadcast_from_rank0(outcome, group, timeout)
    if failure is not None:
        raise failure
    if message is not None:
        raise RankZeroError(message)
    return result  # type: ignore[return-value]
