"""What the driver of a rollout and its actors say to each other, group by group."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sod_mcore.rollout.group import GroupResult
from sod_mcore.rollout.pool import Ticket
from sod_mcore.rollout.request import RolloutRequest
from sod_mcore.serving.client.counters import ClientCounters
from sod_mcore.timeline import Spans


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
class ActorStart:
    """What an actor must know of the pool before its first order.

    Attributes:
        is_gate_open: whether requests may reach the engines.
        weight_version: the oldest weights of the student that may sample; None takes any.
    """

    is_gate_open: bool = True
    weight_version: int | None = None


@dataclass(frozen=True)
class ActorHost:
    """Where an actor is, and what its clock says.

    Attributes:
        name: of the machine.
        boot: tells from each other machines whose clocks have nothing to do with each other.
        clock: seconds of ``time.monotonic`` there.
    """

    name: str
    boot: str
    clock: float

    @classmethod
    def here(cls) -> ActorHost:
        """That of this process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(socket.gethostname(), boot, time.monotonic())


@dataclass(frozen=True)
class ActorReport:
    """What has happened on an actor since its last report.

    Attributes:
        groups: those that are done.
        counts: of groups that are not and have gone on.
        spans: what was done when, in seconds of the driver's clock and lanes of all actors.
        counters: what happened to its requests to the engines so far, by model.
        unusable: groups that cannot be played, and why, in words for the user.
        failure: why the actor cannot go on, in words for the user.
    """

    groups: Mapping[GroupKey, GroupResult] = field(default_factory=dict)
    counts: Mapping[GroupKey, SampleCounts] = field(default_factory=dict)
    spans: Spans = field(default_factory=Spans.of)
    counters: Mapping[str, ClientCounters] = field(default_factory=dict)
    unusable: Mapping[GroupKey, str] = field(default_factory=dict)
    failure: str | None = None
