"""One batch of trajectories: all conversations at once, each scored the moment it ends.

A trajectory that fails for a reason outside the student (an engine, the sandbox, the verifier) is
tried again from its prompt, then dropped and counted; it never takes the batch down and never
becomes an observation or a wrong answer. A failing verifier is asked again first, for the same
trajectory. A trajectory that the teacher cannot score keeps its reward and is marked as unscored by
NaN. Only a data row that its verifier calls unusable ends the batch: no retry would mend it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from sod_mcore.rewards import RewardResult
from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.lanes import Lanes, Track, open_track
from sod_mcore.timeline import SpanRecorder, Spans
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
        spans: what was done when, for every attempt: also for those that failed or were dropped.
    """

    trajectories: tuple[Trajectory, ...]
    num_dropped: int
    num_unscored: int
    num_retries: int
    failures: tuple[str, ...]
    spans: Spans = dataclasses.field(default_factory=Spans.of)


class UnusableRowError(Exception):
    """A data row that its verifier cannot judge any answer by; the message says what is wrong."""


class EpisodeRunner(Protocol):
    """Samples one trajectory of a prompt, without reward and scores; notes turns and tool calls."""

    async def __call__(
        self, prompt: Prompt, request: RolloutRequest, track: Track
    ) -> Trajectory: ...


@dataclass(frozen=True)
class BatchServices:
    """What a batch calls: sampling, rewarding, teacher scoring.

    Attributes:
        run_episode: samples one conversation.
        reward: checks the answer of a finished conversation; raises ValueError where the data row
            is unusable.
        score: returns the trajectory with the teacher's scores, and notes when the teacher was
            asked; raises ``scoring_error`` where the teacher's answer is unusable.
        scoring_error: the exception type of an unusable score.
        lanes: rows of the timeline, for all batches that these services work for.
    """

    run_episode: EpisodeRunner
    reward: Callable[[Prompt, Trajectory], Awaitable[RewardResult]]
    score: Callable[[Prompt, Trajectory, Track], Awaitable[Trajectory]]
    scoring_error: type[Exception]
    lanes: Lanes = dataclasses.field(default_factory=Lanes)


@dataclass
class _Counts:
    """What a batch adds up while it runs."""

    finished: int = 0
    dropped: int = 0
    unscored: int = 0
    retries: int = 0
    failures: dict[str, None] = dataclasses.field(default_factory=dict)
    recorder: SpanRecorder = dataclasses.field(default_factory=SpanRecorder)


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
    results: Sequence[Trajectory | None] = await _all_or_first_error(jobs)
    return RolloutResult(
        trajectories=tuple(t for t in results if t is not None),
        num_dropped=counts.dropped,
        num_unscored=counts.unscored,
        num_retries=counts.retries,
        failures=tuple(counts.failures),
        spans=counts.recorder.take(),
    )


async def _all_or_first_error(
    jobs: Sequence[Coroutine[Any, Any, Trajectory | None]],
) -> Sequence[Trajectory | None]:
    """Results in order; the first error ends the other jobs and is raised."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(*tasks)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """End what still runs, and wait for its end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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
            return await _attempt(prompt, request, services, slots, attempts, counts)
        except UnusableRowError:
            raise
        except Exception as error:
            # Whatever broke, the other trajectories of the batch are worth keeping; the caller
            # stops the run when too many are dropped, and prints these lines then.
            _note_failure(counts, error)
    return None


async def _attempt(
    prompt: Prompt,
    request: RolloutRequest,
    services: BatchServices,
    slots: asyncio.Semaphore,
    attempts: int,
    counts: _Counts,
) -> Trajectory:
    """One try; its lane is held from its slot until it is scored, its slot only while it plays."""
    with ExitStack() as until_scored:
        async with slots:
            track = until_scored.enter_context(
                open_track(counts.recorder, services.lanes, prompt.prompt_id)
            )
            trajectory = await services.run_episode(prompt, request, track)
        return await _finish(prompt, trajectory, request, services, attempts, counts, track)


async def _finish(
    prompt: Prompt,
    trajectory: Trajectory,
    request: RolloutRequest,
    services: BatchServices,
    attempts: int,
    counts: _Counts,
    track: Track,
) -> Trajectory:
    """Reward and teacher scores at the same time, while other conversations still run."""
    scoring = asyncio.create_task(_score(prompt, trajectory, request, services, counts, track))
    try:
        reward = await _reward(prompt, trajectory, services, attempts, counts, track)
        scored = await scoring
    finally:
        await _cancel(scoring)
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
    track: Track,
) -> RewardResult:
    """The verifier's reward; what broke there is tried again before a whole rollout is."""
    for attempt in range(1, attempts + 1):
        try:
            # Beside: the teacher scores the same trajectory meanwhile.
            with track.span_beside("reward"):
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
    track: Track,
) -> Trajectory:
    if not request.with_teacher:
        return trajectory
    try:
        return await services.score(prompt, trajectory, track)
    except services.scoring_error as error:
        counts.unscored += 1
        _note_failure(counts, error)
        return trajectory


def _note_failure(counts: _Counts, error: Exception) -> None:
    line = f"{type(error).__name__}: {error}"
    if line not in counts.failures:
        counts.failures[line] = None
        logger.warning("%s\n%s", line, "".join(traceback.format_exception(error)))
