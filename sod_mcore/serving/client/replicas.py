"""Which engine of a model a request goes to: of those that are up, the one with the least work, or
the one that has the beginning of the request in its prefix cache already.

This is bookkeeping only: nothing is sent from here, and no clock is read.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

MOST_KEYS = 1 << 16
"""Keys remembered of each kind; those that were not used for longest are forgotten first."""

Value = TypeVar("Value")

DownReason = Literal["failed", "stale", "unasked"]
"""Why an engine is not used. "failed": it may be another process when it comes back, and has to
prove its health and its weight version. "stale": its weights are too old. "unasked": its weight
version is about to be asked for, and may well be new enough."""


@dataclass(frozen=True)
class Affinity:
    """Names for what a request has in common with earlier ones.

    Attributes:
        key: requests with this name share a long beginning, as the turns of a trajectory do.
        group: requests with this name share a shorter one, as the samples of a prompt do.
    """

    key: str
    group: str | None = None


@dataclass(frozen=True)
class Patience:
    """How much more work an engine may have than the least loaded one and still be preferred.

    It may have ``factor`` times as much, and ``requests`` times the size of the new request beside
    that. The factor, because outstanding work is counted as the most that may be sampled, of which
    often less than half is: smaller ratios mean nothing. The requests, because an engine decodes a
    few requests in nearly the time of one, so that a few more cost less than a prefix computed
    again.
    """

    factor: float
    requests: int

    def allows(self, outstanding: int, least: int, tokens: int) -> bool:
        """Whether ``outstanding`` tokens are not too many beside ``least``, for ``tokens`` more."""
        return outstanding <= self.factor * least + self.requests * tokens


KEY_PATIENCE = Patience(factor=2.0, requests=8)
"""A whole conversation would be computed again."""
GROUP_PATIENCE = Patience(factor=1.5, requests=2)
"""Only a prompt would be computed again."""


@dataclass(eq=False)
class Replica:
    """One engine, as this client sees it.

    Attributes:
        url: its base URL.
        outstanding_tokens: work not yet answered: inputs, and the most that may be sampled.
        weight_version: the last one that it reported; None before it was asked.
        down_since: loop time in seconds since when it is not used; None while it is up.
        next_check: loop time in seconds at which it is asked again.
        failed_checks: how often it was asked in vain since then.
        down_reason: why it is not used; what it was last down for, while it is up.
        last_problem: what it last said, or what became of a request to it.
        last_chosen: number of the choice that last fell on it.
    """

    url: str
    outstanding_tokens: int = 0
    weight_version: int | None = None
    down_since: float | None = None
    next_check: float = 0.0
    failed_checks: int = 0
    down_reason: DownReason = "unasked"
    last_problem: str = ""
    last_chosen: int = 0

    @property
    def is_up(self) -> bool:
        """Whether requests go to it."""
        return self.down_since is None


class Replicas:
    """The engines of one model.

    Args:
        urls: their base URLs.
        most_keys: keys remembered of each kind.
    """

    def __init__(self, urls: tuple[str, ...], most_keys: int = MOST_KEYS) -> None:
        self.all = tuple(Replica(url) for url in urls)
        self.required_version: int | None = None
        self._most_keys = most_keys
        self._choices = 0
        self._by_key: OrderedDict[str, Replica] = OrderedDict()
        self._by_group: OrderedDict[str, list[Replica]] = OrderedDict()
        self._usable = asyncio.Event()
        self._usable.set()

    def choose(
        self, tokens: int, affinity: Affinity | None = None, other_than: Replica | None = None
    ) -> Replica | None:
        """The engine for a request, or None if none is up.

        Args:
            tokens: the request's work: its input, and the most that may be sampled.
            affinity: what it shares with earlier requests; it is remembered.
            other_than: an engine that shall not be chosen.
        """
        candidates = [r for r in self.all if r.is_up and r is not other_than]
        if not candidates:
            return None
        least = _least_loaded(candidates)
        chosen = self._preferred(affinity, candidates, least, tokens) if affinity else least
        if affinity is not None:
            self._remember(affinity, chosen)
        self._choices += 1
        chosen.last_chosen = self._choices
        return chosen

    @contextmanager
    def working(self, replica: Replica, tokens: int) -> Iterator[None]:
        """Count a request as outstanding work of ``replica`` meanwhile."""
        replica.outstanding_tokens += tokens
        try:
            yield
        finally:
            replica.outstanding_tokens -= tokens

    def forget(self, key: str) -> None:
        """Forget where the requests of ``key`` went: there will be no more."""
        self._by_key.pop(key, None)

    def require_version(self, version: int) -> list[Replica]:
        """Use only engines that have reported at least ``version``; returns those that have not."""
        self.required_version = version
        return [replica for replica in self.all if not self.has_required_version(replica)]

    def has_required_version(self, replica: Replica) -> bool:
        """Whether an engine's weights, as far as they are known, are new enough."""
        if self.required_version is None:
            return True
        return replica.weight_version is not None and (
            replica.weight_version >= self.required_version
        )

    def mark_down(
        self, replica: Replica, problem: str, *, reason: DownReason, now: float, pause: float
    ) -> bool:
        """Use ``replica`` no more until it is marked up.

        Args:
            problem: what it said or did.
            reason: what it has to prove; one that has failed stays so until it is up.
            now: loop time in seconds.
            pause: seconds until it shall be asked.

        Returns:
            whether it has to be asked anew: it was up, or may have got new weights.
        """
        is_new = replica.is_up or reason == "unasked"
        if is_new:
            replica.next_check = now + pause
            replica.failed_checks = 0
        if replica.is_up or replica.down_reason != "failed":
            replica.down_reason = reason
        if reason == "failed":
            replica.weight_version = None
        if replica.is_up or reason != "unasked":
            replica.last_problem = problem
        if replica.is_up:
            replica.down_since = now
        self._note_state()
        return is_new

    def keep_down(
        self, replica: Replica, problem: str, *, reason: DownReason, now: float, pause: float
    ) -> None:
        """Ask ``replica`` again ``pause`` seconds after ``now``, the loop time in seconds."""
        replica.last_problem = problem
        replica.failed_checks += 1
        replica.next_check = now + pause
        replica.down_reason = reason
        if reason == "failed":
            replica.weight_version = None
        self._note_state()

    def mark_up(self, replica: Replica) -> None:
        """Use ``replica`` again."""
        replica.down_since = None
        self._note_state()

    @property
    def are_usable(self) -> bool:
        """Whether a request has somewhere to go, and the choice is not about to grow.

        While engines are asked for their weight version, the first one that answers must not get
        all the requests that wait.
        """
        return self._usable.is_set()

    async def wait_until_usable(self) -> None:
        """Wait until a request has somewhere to go; see :attr:`are_usable`."""
        await self._usable.wait()

    @property
    def wait_for_weights(self) -> bool:
        """Whether an engine is well and only lacks the weights that are required."""
        return any(not replica.is_up and replica.down_reason == "stale" for replica in self.all)

    def problems(self) -> str:
        """Each engine with what it last said."""
        return "; ".join(f"{r.url}: {r.last_problem or 'not asked yet'}" for r in self.all)

    def _note_state(self) -> None:
        is_any_up = any(replica.is_up for replica in self.all)
        is_any_unasked = any(not r.is_up and r.down_reason == "unasked" for r in self.all)
        if is_any_up and not is_any_unasked:
            self._usable.set()
        else:
            self._usable.clear()

    def _preferred(
        self, affinity: Affinity, candidates: list[Replica], least: Replica, tokens: int
    ) -> Replica:
        """The engine that has the request's beginning, unless it has far more to do than others."""
        known = self._by_key.get(affinity.key)
        if known in candidates and _has_time(known, least, tokens, KEY_PATIENCE):
            return known
        of_group = [r for r in self._by_group.get(affinity.group or "", []) if r in candidates]
        if of_group:
            best = _least_loaded(of_group)
            if _has_time(best, least, tokens, GROUP_PATIENCE):
                return best
        return least

    def _remember(self, affinity: Affinity, replica: Replica) -> None:
        self._by_key[affinity.key] = replica
        _trim(self._by_key, affinity.key, self._most_keys)
        if affinity.group is None:
            return
        of_group = self._by_group.setdefault(affinity.group, [])
        if replica not in of_group:
            of_group.append(replica)
        _trim(self._by_group, affinity.group, self._most_keys)


def _least_loaded(replicas: list[Replica]) -> Replica:
    """Of several without work, the one that has waited longest for some."""
    return min(replicas, key=lambda r: (r.outstanding_tokens, r.last_chosen))


def _has_time(replica: Replica, least: Replica, tokens: int, patience: Patience) -> bool:
    return patience.allows(replica.outstanding_tokens, least.outstanding_tokens, tokens)


def _trim(mapping: OrderedDict[str, Value], used: str, most: int) -> None:
    mapping.move_to_end(used)
    while len(mapping) > most:
        mapping.popitem(last=False)
