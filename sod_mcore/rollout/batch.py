"""One batch of trajectories: the conversations of all prompts at once.

A batch may ask for more prompts than it needs: the first that are done count, and the conversations
of the others are ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sod_mcore.rollout.group import BatchServices, Group, GroupResult
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.rollout.slots import Slots
from sod_mcore.tasks import first_of
from sod_mcore.timeline import SpanRecorder, Spans


async def run_batch(
    request: RolloutRequest,
    services: BatchServices,
    *,
    slots: Slots,
    priority: int,
    attempts: int,
    on_progress: Callable[[RolloutProgress], None],
    recorder: SpanRecorder | None = None,
) -> RolloutResult:
    """Sample, reward and score every trajectory of ``request``.

    Args:
        slots: conversations under way at the same time, over all batches; scoring holds none.
        priority: of its conversations, among those that wait for a slot.
        attempts: tries of a trajectory before it is dropped.
        on_progress: called after each trajectory.
        recorder: takes what was done when; a caller that has one of its own can tell of spans
            before the batch is done. The result has those that nobody has taken.

    Raises:
        UnusableRowError: a data row cannot be judged.
    """
    recorder = recorder or SpanRecorder()
    progress = _Progress(request, on_progress)
    groups = [
        Group(
            prompt,
            request,
            services,
            hold_slot=partial(slots.hold, priority),
            attempts=attempts,
            recorder=recorder,
            on_sample=progress.count,
        )
        for prompt in request.prompts
    ]
    runs = [group.run() for group in groups]
    finished = await first_of(runs, request.num_prompts, lambda group: bool(group.trajectories))
    progress.end()
    return collect_groups(finished, request, recorder.take())


def collect_groups(
    groups: Sequence[GroupResult], request: RolloutRequest, spans: Spans
) -> RolloutResult:
    """The batch that the finished groups of a request make."""
    return RolloutResult(
        trajectories=tuple(t for group in groups for t in group.trajectories),
        num_dropped=sum(group.num_dropped for group in groups),
        num_unscored=sum(group.num_unscored for group in groups),
        num_retries=sum(group.num_retries for group in groups),
        failures=tuple(dict.fromkeys(f for group in groups for f in group.failures)),
        num_cancelled=request.spare_prompts * request.samples_per_prompt,
        spans=spans,
    )


class _Progress:
    """Counts samples; with spare prompts the total is known only at the end."""

    def __init__(
        self, request: RolloutRequest, on_progress: Callable[[RolloutProgress], None]
    ) -> None:
        self._total = len(request.prompts) * request.samples_per_prompt
        self._on_progress = on_progress
        self._finished = 0
        self._dropped = 0

    def count(self, is_dropped: bool) -> None:
        """One more sample is over."""
        self._dropped += is_dropped
        self._finished += not is_dropped
        self._tell(self._total)

    def end(self) -> None:
        """No more samples will come."""
        if self._finished + self._dropped < self._total:
            self._tell(self._finished + self._dropped)

    def _tell(self, total: int) -> None:
        self._on_progress(RolloutProgress(self._finished, self._dropped, total))
