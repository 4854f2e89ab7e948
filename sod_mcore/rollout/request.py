"""What the trainer asks of a rollout pool, and what comes back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sod_mcore.rollout.episode import Sampling
from sod_mcore.timeline import Spans
from sod_mcore.trajectory import Prompt, Trajectory


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
        weight_version: the oldest weights of the student that may sample it; None takes any.
        is_urgent: whether its conversations go before those of batches submitted earlier.
    """

    prompts: tuple[Prompt, ...]
    samples_per_prompt: int
    sampling: Sampling
    with_teacher: bool = True
    tools_enabled: bool = True
    spare_prompts: int = 0
    weight_version: int | None = None
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
        spans: what was done when and has not been told before, for every attempt: also for those
            that failed or were dropped.
    """

    trajectories: tuple[Trajectory, ...]
    num_dropped: int
    num_unscored: int
    num_retries: int
    failures: tuple[str, ...]
    num_cancelled: int = 0
    spans: Spans = dataclasses.field(default_factory=Spans.of)
