"""One batch of trajectories: all conversations at once, each scored the moment it ends.

A trajectory that fails for a reason outside the student (an engine, the sandbox, the verifier) is
tried again from its prompt, then dropped and counted; it never takes the batch down and never
becomes an observation or a wrong answer. A failing verifier is asked again first, for the same
trajectory. A trajectory that the teacher cannot score keeps its reward and is marked as unscored by
NaN. Only a data row that its verifier calls unusable ends the batch: no retry would mend it.

A batch may ask for more prompts than it needs: the first that are done count, and the conversations
of the others are ended.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from sod_mcore.rewards import RewardResult
from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.jobs import all_or_first_error, cancel_and_wait, first_of
from sod_mcore.rollout.slots import HoldSlot, Slots
from sod_mcore.trajectory import Prompt, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutRequest:
    """What to sample.

    Attributes:
        prompts: the prompts; each becomes a group.
        samples_per_prompt: trajectories of each prompt.
        sampling: temperature and nucleus.
        with_teacher: whether the teacher scores each trajectory.
        tools_enabled: whether tool calls are executed.
        spare_prompts: prompts more than are needed. When all others are done, those that are not
            are given up, whichever they are: this leaves out the prompts whose slowest sample is
            slowest, so the batch leans towards short answers.
        is_urgent: whether its conversations go before those of batches submitted earlier.
    """

    prompts: tuple[Prompt, ...]
    samples_per_prompt: int
    sampling: Sampling
    with_teacher: bool = True
    tools_enabled: bool = True
    spare_prompts: int = 0
    is_urgent: bool = False

    @property
    def num_prompts(self) -> int:
        """Prompts of a whole batch."""
        return len(self.prompts) - self.spare_prompts

    @property
    def num_trajectories(self) -> int:
        """Trajectories of a whole batch."""
        return self.num_prompts * self.samples_per_prompt


@dataclass(frozen=True)
class RolloutProgress:
    """How far a batch is; sent while it runs."""

    finished: int
    dropped: int
    total: int


@dataclass(frozen=True)
class RolloutResult:
    """A finished batch: trajectories in prompt order, samples of a group together.

    Attributes:
        trajectories: those that were not dropped, of the prompts that count.
        num_dropped: trajectories of these prompts that were given up after all attempts.
        num_unscored: those that the teacher was asked to score and could not.
        num_retries: attempts beyond the first.
        failures: one line for each kind of failure met, for the log.
        num_cancelled: trajectories of the prompts that were not waited for.
    """

    trajectories: tuple[Trajectory, ...]
    num_dropped: int
    num_unscored: int
    num_retries: int
    failures: tuple[str, ...]
    num_cancelled: int = 0


class UnusableRowError(Exception):
    """A data row that its verifier cannot judge any answer by; the message says what is wrong."""


class EpisodeRunner(Protocol):
    """Samples one trajectory of a prompt, without reward and scores."""

    async def __call__(self, prompt: Prompt, request: RolloutRequest) -> Trajectory: ...


@dataclass(frozen=True)
class BatchServices:
    """What a batch calls: sampling, rewarding, teacher scoring.

    Attributes:
        run_episode: samples one conversation.
        reward: checks the answer of a finished conversation; raises ValueError where the data row
            is unusable.
        score: returns the trajectory with the teacher's scores; raises ``scoring_error`` where the
            teacher's answer is unusable.
        scoring_error: the exception type of an unusable score.
    """

    run_episode: EpisodeRunner
    reward: Callable[[Prompt, Trajectory], Awaitable[RewardResult]]
    score: Callable[[Prompt, Trajectory], Awaitable[Trajectory]]
    scoring_error: type[Exception]


@dataclass
class _Counts:
    """What happened to the samples of one prompt."""

    dropped: int = 0
    unscored: int = 0
    retries: int = 0
    failures: dict[str, None] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class GroupResult:
    """The samples of one prompt, all finished or dropped; fields as in :class:`RolloutResult`."""

    trajectories: tuple[Trajectory, ...]
    num_dropped: int = 0
    num_unscored: int = 0
    num_retries: int = 0
    failures: tuple[str, ...] = ()


async def run_batch(
    request: RolloutRequest,
    services: BatchServices,
    *,
    slots: Slots,
    priority: int,
    attempts: int,
    on_progress: Callable[[RolloutProgress], None],
) -> RolloutResult:
    """Sample, reward and score every trajectory of a batch.

    Args:
        request: what to sample.
        services: what does it.
        slots: bound the conversations under way over all batches that share them.
        priority: of this batch's claim to free slots; a smaller one goes first.
        attempts: tries of one trajectory.
        on_progress: called when a trajectory is finished or dropped.

    Raises:
        UnusableRowError: of the first such row; every other conversation is ended first.
    """
    num_started = len(request.prompts) * request.samples_per_prompt
    finished = dropped = 0

    def hear(is_finished: bool) -> None:
        nonlocal finished, dropped
        finished += is_finished
        dropped += not is_finished
        on_progress(RolloutProgress(finished, dropped, num_started))

    hold_slot = partial(slots.hold, priority)
    jobs = [
        run_group(prompt, request, services, hold_slot=hold_slot, attempts=attempts, on_sample=hear)
        for prompt in request.prompts
    ]
    groups = await first_of(jobs, request.num_prompts)
    if request.spare_prompts:
        on_progress(RolloutProgress(finished, dropped, finished + dropped))
    return join_groups(groups, request)


async def run_group(
    prompt: Prompt,
    request: RolloutRequest,
    services: BatchServices,
    *,
    hold_slot: HoldSlot,
    attempts: int,
    on_sample: Callable[[bool], None],
) -> GroupResult:
    """Sample, reward and score every trajectory of one prompt.

    Args:
        prompt: the prompt.
        request: the batch that it belongs to.
        services: what does it.
        hold_slot: held while a conversation is played.
        attempts: tries of one trajectory.
        on_sample: hears of each trajectory whether it is finished, or else dropped.

    Raises:
        UnusableRowError: the row is; every conversation of the group is ended first.
    """
    counts = _Counts()

    async def one() -> Trajectory | None:
        trajectory = await _sample_and_score(prompt, request, services, hold_slot, attempts, counts)
        counts.dropped += trajectory is None
        on_sample(trajectory is not None)
        return trajectory

    samples = await all_or_first_error([one() for _ in range(request.samples_per_prompt)])
    return GroupResult(
        trajectories=tuple(t for t in samples if t is not None),
        num_dropped=counts.dropped,
        num_unscored=counts.unscored,
        num_retries=counts.retries,
        failures=tuple(counts.failures),
    )


def join_groups(groups: Sequence[GroupResult], request: RolloutRequest) -> RolloutResult:
    """The batch of these groups, which are those that count, in prompt order."""
    return RolloutResult(
        trajectories=tuple(t for group in groups for t in group.trajectories),
        num_dropped=sum(group.num_dropped for group in groups),
        num_unscored=sum(group.num_unscored for group in groups),
        num_retries=sum(group.num_retries for group in groups),
        failures=tuple(dict.fromkeys(line for group in groups for line in group.failures)),
        num_cancelled=request.spare_prompts * request.samples_per_prompt,
    )


async def _sample_and_score(
    prompt: Prompt,
    request: RolloutRequest,
    services: BatchServices,
    hold_slot: HoldSlot,
    attempts: int,
    counts: _Counts,
) -> Trajectory | None:
    for attempt in range(attempts):
        counts.retries += attempt > 0
        try:
            async with hold_slot():
                trajectory = await services.run_episode(prompt, request)
            return await _finish(prompt, trajectory, request, services, attempts, counts)
        except UnusableRowError:
            raise
        except Exception as error:
            # Whatever broke, the other trajectories of the batch are worth keeping; the caller
            # stops the run when too many are dropped, and prints these lines then.
            _note_failure(counts, error)
    return None


async def _finish(
    prompt: Prompt,
    trajectory: Trajectory,
    request: RolloutRequest,
    services: BatchServices,
    attempts: int,
    counts: _Counts,
) -> Trajectory:
    """Reward and teacher scores at the same time, while other conversations still run."""
    scoring = asyncio.create_task(_score(prompt, trajectory, request, services, counts))
    try:
        reward = await _reward(prompt, trajectory, services, attempts, counts)
        scored = await scoring
    finally:
        await cancel_and_wait(scoring)
    return dataclasses.replace(
        scored,
        reward=reward.reward,
        is_correct=reward.is_correct,
        category=reward.category,
        prediction=reward.prediction,
        reward_parts=dict(reward.parts),
    )


async def _reward(
    prompt: Prompt,
    trajectory: Trajectory,
    services: BatchServices,
    attempts: int,
    counts: _Counts,
) -> RewardResult:
    """The verifier's reward; what broke there is tried again before a whole rollout is."""
    for attempt in range(1, attempts + 1):
        try:
            return await services.reward(prompt, trajectory)
        except ValueError as error:
            raise UnusableRowError(f"{prompt.prompt_id}: {error}") from error
        except Exception as error:
            if attempt == attempts:
                raise
            _note_failure(counts, error)
    raise AssertionError("unreachable: the last try returns or raises")


async def _score(
    prompt: Prompt,
    trajectory: Trajectory,
    request: RolloutRequest,
    services: BatchServices,
    counts: _Counts,
) -> Trajectory:
    if not request.with_teacher:
        return trajectory
    try:
        return await services.score(prompt, trajectory)
    except services.scoring_error as error:
        counts.unscored += 1
        _note_failure(counts, error)
        return trajectory


def _note_failure(counts: _Counts, error: Exception) -> None:
    line = f"{type(error).__name__}: {error}"
    if line not in counts.failures:
        counts.failures[line] = None
        logger.warning("%s\n%s", line, "".join(traceback.format_exception(error)))
