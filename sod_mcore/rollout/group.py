"""All samples of one prompt, each scored the moment it ends.

A trajectory that fails for a reason outside the student (an engine, the sandbox, the verifier) is
tried again from its prompt, then dropped and counted; it never takes the batch down and never
becomes an observation or a wrong answer. A failing verifier is asked again first, for the same
trajectory, and so is a failing teacher. A trajectory that the teacher cannot score keeps its reward
and is marked as unscored by NaN. Only a data row that its verifier calls unusable ends the batch:
no retry would mend it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

from sod_mcore.rewards import RewardResult
from sod_mcore.rollout.lanes import Lanes, Track, open_track
from sod_mcore.rollout.request import RolloutRequest
from sod_mcore.tasks import all_or_first_error, cancel
from sod_mcore.timeline import SpanRecorder
from sod_mcore.trajectory import Prompt, Trajectory

logger = logging.getLogger(__name__)


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
        scoring_error: the exception type of an unusable score; after any other the teacher is asked
            again.
        lanes: rows of the timeline, for all batches that these services work for.
    """

    run_episode: EpisodeRunner
    reward: Callable[[Prompt, Trajectory], Awaitable[RewardResult]]
    score: Callable[[Prompt, Trajectory, Track], Awaitable[Trajectory]]
    scoring_error: type[Exception]
    lanes: Lanes = dataclasses.field(default_factory=Lanes)


@dataclass(frozen=True)
class GroupResult:
    """The samples of one prompt, all finished or dropped.

    Attributes:
        trajectories: those that were not dropped.
        num_dropped: those that were given up after all attempts.
        num_unscored: those that the teacher was asked to score and could not.
        num_retries: attempts beyond the first.
        failures: one line for each kind of failure met.
    """

    trajectories: tuple[Trajectory, ...]
    num_dropped: int
    num_unscored: int
    num_retries: int
    failures: tuple[str, ...]


class Group:
    """One prompt of a request.

    Args:
        prompt: it.
        request: how it is sampled.
        services: what is called.
        hold_slot: held while a conversation is under way; scoring holds none.
        attempts: tries of a trajectory before it is dropped.
        recorder: takes what was done when.
        on_sample: called after each sample, with whether it was dropped.
    """

    def __init__(
        self,
        prompt: Prompt,
        request: RolloutRequest,
        services: BatchServices,
        *,
        hold_slot: Callable[[], AbstractAsyncContextManager[None]],
        attempts: int,
        recorder: SpanRecorder,
        on_sample: Callable[[bool], None],
    ) -> None:
        self._prompt = prompt
        self._request = request
        self._services = services
        self._hold_slot = hold_slot
        self._attempts = attempts
        self._recorder = recorder
        self._on_sample = on_sample
        self._num_unscored = 0
        self._num_retries = 0
        self._failures: dict[str, None] = {}

    async def run(self) -> GroupResult:
        """Sample, reward and score all of its trajectories.

        Raises:
            UnusableRowError: no answer can be judged.
        """
        num_samples = self._request.samples_per_prompt
        samples = await all_or_first_error([self._sample() for _ in range(num_samples)])
        trajectories = tuple(t for t in samples if t is not None)
        return GroupResult(
            trajectories,
            num_dropped=num_samples - len(trajectories),
            num_unscored=self._num_unscored,
            num_retries=self._num_retries,
            failures=tuple(self._failures),
        )

    async def _sample(self) -> Trajectory | None:
        trajectory = None
        for attempt in range(self._attempts):
            self._num_retries += attempt > 0
            try:
                trajectory = await self._attempt()
                break
            except UnusableRowError:
                raise
            except Exception as error:
                # Whatever broke, the other trajectories of the batch are worth keeping; the caller
                # stops the run when too many are dropped, and prints these lines then.
                self._note_failure(error)
        self._on_sample(trajectory is None)
        return trajectory

    async def _attempt(self) -> Trajectory:
        """One try; the lane is held from the slot until it is scored, the slot while it plays."""
        with ExitStack() as until_scored:
            async with self._hold_slot():
                track = until_scored.enter_context(
                    open_track(self._recorder, self._services.lanes, self._prompt.prompt_id)
                )
                trajectory = await self._services.run_episode(self._prompt, self._request, track)
            return await self._finish(trajectory, track)

    async def _finish(self, trajectory: Trajectory, track: Track) -> Trajectory:
        """Reward and teacher scores at the same time, while other conversations still run."""
        scoring = asyncio.create_task(self._score(trajectory, track))
        try:
            reward = await self._reward(trajectory, track)
            scored = await scoring
        finally:
            await cancel(scoring)
        return dataclasses.replace(
            scored,
            reward=reward.reward,
            is_correct=reward.is_correct,
            category=reward.category,
            prediction=reward.prediction,
            reward_parts=dict(reward.parts),
        )

    async def _reward(self, trajectory: Trajectory, track: Track) -> RewardResult:
        """The verifier's reward; what broke there is tried again before a whole rollout is."""
        for attempt in range(1, self._attempts + 1):
            try:
                # Beside: the teacher scores the same trajectory meanwhile.
                with track.span_beside("reward"):
                    return await self._services.reward(self._prompt, trajectory)
            except ValueError as error:
                raise UnusableRowError(f"{self._prompt.prompt_id}: {error}") from error
            except Exception as error:
                if attempt == self._attempts:
                    raise
                self._note_failure(error)
        raise AssertionError("unreachable: the last try returns or raises")

    async def _score(self, trajectory: Trajectory, track: Track) -> Trajectory:
        if not self._request.with_teacher:
            return trajectory
        for _ in range(self._attempts):
            try:
                return await self._services.score(self._prompt, trajectory, track)
            except self._services.scoring_error as error:
                self._note_failure(error)
                break  # another try would bring the same
            except Exception as error:
                self._note_failure(error)
        self._num_unscored += 1
        return trajectory

    def _note_failure(self, error: Exception) -> None:
        line = f"{type(error).__name__}: {error}"
        if line not in self._failures:
            self._failures[line] = None
            logger.warning("%s\n%s", line, "".join(traceback.format_exception(error)))
