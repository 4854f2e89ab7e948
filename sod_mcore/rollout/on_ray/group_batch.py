"""One batch that several actors play: who has which group, what is back, what was lost.

Prompt ``i`` belongs to actor ``i`` modulo their number, whoever that actor is at the time. The
groups of an actor that dies are played again by its successor, a limited number of times: a group
that kills every actor must not keep the run from ending.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from sod_mcore.rollout.batch import collect_groups
from sod_mcore.rollout.group import GroupResult
from sod_mcore.rollout.on_ray.group_messages import GroupKey, GroupsOrder, SampleCounts
from sod_mcore.rollout.pool import URGENT, Ticket
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.timeline import Spans


class GroupBatch:
    """The state of one batch.

    Args:
        ticket: names the batch.
        request: what to sample.
        num_actors: over which the prompts are dealt.
        attempts: times that a group is given to an actor before its trajectories count as dropped.
    """

    def __init__(
        self, ticket: Ticket, request: RolloutRequest, num_actors: int, attempts: int
    ) -> None:
        self._ticket = ticket
        self._request = request
        self._num_actors = num_actors
        self._attempts = attempts
        self._results: dict[int, GroupResult] = {}
        self._counts: dict[int, SampleCounts] = {}
        self._losses: defaultdict[int, list[str]] = defaultdict(list)

    @property
    def is_done(self) -> bool:
        """Whether as many groups are back as the batch needs."""
        return len(self._results) == self._request.num_prompts

    def unfinished(self, actor: int) -> list[GroupKey]:
        """The groups of an actor that are not back, in prompt order."""
        positions = range(actor, len(self._request.prompts), self._num_actors)
        return [
            GroupKey(self._ticket, position)
            for position in positions
            if position not in self._results
        ]

    def order_for(self, actor: int) -> GroupsOrder:
        """The groups of an actor that are not back, to be played; there may be none."""
        positions = tuple(key.position for key in self.unfinished(actor))
        prompts = tuple(self._request.prompts[position] for position in positions)
        return GroupsOrder(
            ticket=self._ticket,
            priority=URGENT if self._request.is_urgent else self._ticket,
            request=dataclasses.replace(self._request, prompts=prompts, spare_prompts=0),
            positions=positions,
        )

    def note(self, position: int, counts: SampleCounts) -> None:
        """An unfinished group has gone on."""
        self._counts[position] = counts

    def take(self, position: int, result: GroupResult) -> None:
        """A group is back; ignored when enough are."""
        if self.is_done or position in self._results:
            return
        losses = self._losses[position]
        self._results[position] = dataclasses.replace(
            result,
            num_retries=result.num_retries + len(losses) * self._request.samples_per_prompt,
            failures=tuple(dict.fromkeys((*losses, *result.failures))),
        )
        self._counts[position] = SampleCounts(len(result.trajectories), result.num_dropped)

    def lose(self, actor: int, cause: str) -> None:
        """An actor has died: each of its unfinished groups is played again, or given up."""
        for _, position in self.unfinished(actor):
            if len(self._losses[position]) + 1 == self._attempts:
                self.take(position, self._given_up(cause))
            else:
                self._losses[position].append(cause)
                self._counts.pop(position, None)

    def _given_up(self, cause: str) -> GroupResult:
        num_dropped = self._request.samples_per_prompt
        return GroupResult((), num_dropped, num_unscored=0, num_retries=0, failures=(cause,))

    @property
    def progress(self) -> RolloutProgress:
        """How far the batch is; of a batch that is done, only what counts."""
        counts = [
            counts
            for position, counts in self._counts.items()
            if position in self._results or not self.is_done
        ]
        finished = sum(each.finished for each in counts)
        dropped = sum(each.dropped for each in counts)
        num_started = len(self._request.prompts) * self._request.samples_per_prompt
        return RolloutProgress(
            finished, dropped, finished + dropped if self.is_done else num_started
        )

    def result(self) -> RolloutResult:
        """The batch, in prompt order, once it is done; its spans are told as they come."""
        assert self.is_done
        groups = [self._results[position] for position in sorted(self._results)]
        return collect_groups(groups, self._request, Spans.of())
