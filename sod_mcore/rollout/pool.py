"""The rollout pool as its users see it: submit a batch, collect it, pause, resume, close.

What plays the batches is a process (``process_pool.py``) or Ray actors (``on_ray/``);
``open_pool.py`` chooses by ``rollout.pool``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from sod_mcore.config import (
    ChatConfig,
    RewardConfig,
    RolloutConfig,
    ServingConfig,
    TeacherConfig,
    ToolsConfig,
)
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.serving.client.counters import ClientCounters
from sod_mcore.timeline import Spans

START_TIMEOUT_SECONDS = 180.0
"""Until a pool has reached the engines and started its sandbox."""
CLOSE_TIMEOUT_SECONDS = 10.0
"""For an orderly end; then comes a kill."""
POLL_SECONDS = 0.2
"""Between two looks at whether the caller wants to stop."""

SpanListener = Callable[[Spans], None]
"""Hears what was done when."""

Ticket = int
"""Names a submitted batch; later ones have larger tickets."""
URGENT = -1
"""Priority that goes before every ticket."""


@dataclass(frozen=True)
class PoolSettings:
    """All that whatever plays the batches needs to know; sent to it once at start."""

    run_directory: Path
    serving_directory: Path
    student_path: Path
    serving: ServingConfig
    rollout: RolloutConfig
    tools: ToolsConfig
    reward: RewardConfig
    chat: ChatConfig
    teacher: TeacherConfig
    teacher_top_k: int
    sources: tuple[str, ...]


class RolloutError(RuntimeError):
    """The pool died, missed its deadline or lost too many trajectories."""


class RolloutInterruptedError(Exception):
    """Collecting was given up because the run was asked to stop."""


class RolloutPool(Protocol):
    """Plays batches; a context manager. In training, global rank 0 alone has one.

    Whatever the pool cannot recover from is a :class:`RolloutError`, from any of the methods.
    """

    @property
    def counters(self) -> Mapping[str, ClientCounters]:
        """What happened to its requests to the engines, by model, as far as is known."""
        ...

    def submit(self, request: RolloutRequest) -> Ticket:
        """Begin a batch, beside those that are under way; returns what ``collect`` takes.

        Conversations of earlier batches, and of urgent ones, get free slots first.
        """
        ...

    def collect(
        self,
        ticket: Ticket,
        timeout_seconds: float,
        on_progress: Callable[[RolloutProgress], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> RolloutResult:
        """Wait for a batch; each can be collected once.

        Raises:
            RolloutError: the pool died or the deadline passed.
            RolloutInterruptedError: ``should_stop`` became true first.
        """
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Give up a batch that was not collected: its conversations are ended."""
        ...

    def hear(self) -> None:
        """Take in what the pool has told meanwhile, and do not wait for more.

        Raises:
            RolloutError: it died.
        """
        ...

    def pause(self, timeout_seconds: float = 60.0) -> None:
        """Let no further request reach the engines; returns when none is in flight."""
        ...

    def resume(self, timeout_seconds: float = 60.0) -> None:
        """Let requests through again."""
        ...

    def close(self) -> None:
        """Give up what is under way, and end whatever plays."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def describe_failure(error: BaseException) -> str:
    """What the run says of an error that ended its pool."""
    return f"rollout pool: {type(error).__name__}: {error}"


def check_losses(result: RolloutResult, request: RolloutRequest, config: RolloutConfig) -> None:
    """Stop the run when too much of a batch was lost to infrastructure (design rule 8).

    Raises:
        RolloutError: more than the configured share was dropped or could not be scored.
    """
    losses = (
        ("dropped", result.num_dropped, config.max_dropped_fraction, "max_dropped_fraction"),
        ("unscored", result.num_unscored, config.max_unscored_fraction, "max_unscored_fraction"),
    )
    for word, count, allowed, field_name in losses:
        if count > allowed * request.num_trajectories:
            causes = "; ".join(result.failures) or "no cause recorded"
            raise RolloutError(
                f"{count} of {request.num_trajectories} trajectories {word}, more than "
                f"rollout.{field_name}={allowed} allows. Causes: {causes}"
            )
