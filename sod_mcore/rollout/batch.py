"""One batch of trajectories: all conversations at once, each scored the moment it ends.

A trajectory that fails for a reason outside the student (an engine, the sandbox, the verifier) is
tried again from its prompt, then dropped and counted; it never takes the batch down and never
becomes an observation or a wrong answer. A trajectory that the teacher cannot score keeps its
reward and is marked as unscored by NaN.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sod_mcore.rewards import RewardResult
from sod_mcore.rollout.episode import Sampling
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
    """

    prompts: tuple[Prompt, ...]
    samples_per_prompt: int
    sampling: Sampling
    with_teacher: bool = True
    tools_enabled: bool = True

    @property
    def num_trajectories(self) -> int:
        """Trajectories asked for."""
        return len(self.prompts) * self.samples_per_prompt


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
        trajectories: those that were not dropped.
        num_dropped: trajectories given up after all attempts.
        num_unscored: trajectories that the teacher was asked to score and could not.
        num_retries: attempts beyond the first.
        failures: one line for each kind of failure met, for the log.
    """

    trajectories: tuple[Trajectory, ...]
    num_dropped: int
    num_unscored: int
    num_retries: int
    failures: tuple[str, ...]


class EpisodeRunner(Protocol):
    """Samples one trajectory of a prompt, without reward and scores."""

    async def __call__(self, prompt: Prompt, request: RolloutRequest) -> Trajectory: ...


@dataclass(frozen=True)
class BatchServices:
    """What a batch calls: sampling, rewarding, teacher scoring.

    Attributes:
        run_episode: samples one conversation.
        reward: checks the answer of a finished conversation.
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
    finished: int = 0
    dropped: int = 0
    unscored: int = 0
    retries: int = 0
    failures: dict[str, None] = dataclasses.field(default_factory=dict)


async def run_batch(
    request: RolloutRequest,
    services: BatchServices,
    *,
    concurrency: int,
    attempts: int,
    on_progress: Callable[[RolloutProgress], None],
) -> RolloutResult:
    """Sample, reward and score every trajectory of ``request``.

    Args:
        concurrency: conversations under way at the same time; scoring does not count.
        attempts: tries of a trajectory before it is dropped.
        on_progress: called after each trajectory.
    """
    slots = asyncio.Semaphore(concurrency)
    counts = _Counts()

    async def one(prompt: Prompt) -> Trajectory | None:
        trajectory = await _sample_and_score(prompt, request, services, slots, attempts, counts)
        counts.finished += trajectory is not None
        counts.dropped += trajectory is None
        on_progress(RolloutProgress(counts.finished, counts.dropped, request.num_trajectories))
        return trajectory

    jobs = [one(prompt) for prompt in request.prompts for _ in range(request.samples_per_prompt)]
    results: Sequence[Trajectory | None] = await asyncio.gather(*jobs)
    return RolloutResult(
        trajectories=tuple(t for t in results if t is not None),
        num_dropped=counts.dropped,
        num_unscored=counts.unscored,
        num_retries=counts.retries,
        failures=tuple(counts.failures),
    )


async def _sample_and_score(
    prompt: Prompt,
    request: RolloutRequest,
    services: BatchServices,
    slots: asyncio.Semaphore,
    attempts: int,
    counts: _Counts,
) -> Trajectory | None:
    for attempt in range(attempts):
        counts.retries += attempt > 0
        try:
            async with slots:
                trajectory = await services.run_episode(prompt, request)
            return await _finish(prompt, trajectory, request, services, counts)
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
    counts: _Counts,
) -> Trajectory:
    """Reward and teacher scores at the same time, while other conversations still run."""
    reward, scored = await asyncio.gather(
        services.reward(prompt, trajectory),
        _score(prompt, trajectory, request, services, counts),
    )
    return dataclasses.replace(
        scored,
        reward=reward.reward,
        is_correct=reward.is_correct,
        category=reward.category,
        prediction=reward.prediction,
        reward_parts=dict(reward.parts),
    )


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
