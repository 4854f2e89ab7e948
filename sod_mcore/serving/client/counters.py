"""What happened to the requests to one model, in numbers for the metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClientCounters:
    """Counts since the client was opened.

    Attributes:
        requests: requests of callers.
        retries: further tries of them.
        connection_failures: connections that were refused or broke off.
        timeouts: requests that no engine answered in time.
        bad_answers: answers with a status of 500 or more, or that are not what was asked for.
        hedged: scoring requests that were sent to a second engine.
        stale_answers: answers with older weights than required, which were discarded.
        seconds_waited: time that requests waited because no engine could be used, added up.
    """

    requests: int = 0
    retries: int = 0
    connection_failures: int = 0
    timeouts: int = 0
    bad_answers: int = 0
    hedged: int = 0
    stale_answers: int = 0
    seconds_waited: float = 0.0


def total(counters: Iterable[ClientCounters]) -> ClientCounters:
    """The sums of the counts of several clients."""
    tally = Tally()
    for each in counters:
        tally.add(**dataclasses.asdict(each))
    return tally.counters


class Tally:
    """Counters that grow.

    Attributes:
        counters: what they are now.
    """

    def __init__(self) -> None:
        self.counters = ClientCounters()

    def add(self, **added: float) -> None:
        """Add to the counters of these names."""
        changed = {name: getattr(self.counters, name) + more for name, more in added.items()}
        self.counters = dataclasses.replace(self.counters, **changed)
