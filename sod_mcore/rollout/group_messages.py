"""What the driver of a rollout and its actors say to each other, group by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sod_mcore.rollout.batch import GroupResult, RolloutRequest
from sod_mcore.rollout.pool import Ticket


class GroupKey(NamedTuple):
    """Names a group among all batches.

    Attributes:
        ticket: the batch.
        position: place of the prompt in the batch.
    """

    ticket: Ticket
    position: int


class SampleCounts(NamedTuple):
    """How far a group is: trajectories."""

    finished: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class GroupsOrder:
    """Groups of one batch for one actor.

    Attributes:
        ticket: the batch.
        priority: of its claim to free slots; a smaller one goes first.
        request: the batch, with the prompts of these groups only.
        positions: the place of each of them in the whole batch.
    """

    ticket: Ticket
    priority: int
    request: RolloutRequest
    positions: tuple[int, ...]


@dataclass(frozen=True)
class ActorReport:
    """What has happened on an actor since its last report.

    Attributes:
        groups: those that are done.
        counts: of groups that are not and have gone on.
        failure: why the actor cannot go on, in words for the user.
    """

    groups: Mapping[GroupKey, GroupResult] = field(default_factory=dict)
    counts: Mapping[GroupKey, SampleCounts] = field(default_factory=dict)
    failure: str | None = None
