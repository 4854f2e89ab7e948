"""Where a step's trajectories come from: live rollouts, or a recorded batch.

Both give the same type, so the trainer does not know which one it reads. Used by global rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sod_mcore.config import ConfigError, SodConfig
from sod_mcore.data.prompts import PromptSource
from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.loop.stop import StopRequest
from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.pool import RolloutError, RolloutPool, Ticket, check_losses
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest
from sod_mcore.trajectory import RecordedBatch, recorded_batch_path

ProgressCallback = Callable[[RolloutProgress], None]


class TrajectorySource(Protocol):
    """Gives each step its trajectories."""

    def batch(self, step: int, weight_version: int) -> RecordedBatch: ...


@dataclass(frozen=True)
class LiveSource:
    """Submits the prompts of a step, and of those that may be sampled ahead, to the pool.

    With ``rollout.max_staleness`` n, a step is submitted as soon as the weights of the step n
    before it are published: they, or newer ones, sample every token of it.

    Attributes:
        tickets: batches that the pool works on, by step.
    """

    pool: RolloutPool
    prompts: PromptSource
    config: SodConfig
    stop: StopRequest
    watch: EngineWatch
    on_progress: ProgressCallback | None = None
    tickets: dict[int, Ticket] = field(default_factory=dict)

    def batch(self, step: int, weight_version: int) -> RecordedBatch:
        """The trajectories of step ``step``; written to ``run.record`` where that is set.

        Raises:
            RolloutError: the pool failed, or lost more trajectories than the limits allow, or a
                token is older than ``rollout.max_staleness`` allows.
            RolloutInterruptedError: the run was asked to stop, or an engine waits for its weights;
                the batch goes on, and can be asked for again.
        """
        self._submit_ahead(step, weight_version)
        result = self.pool.collect(
            self.tickets[step],
            self.config.rollout.deadline_seconds,
            self.on_progress,
            should_stop=lambda: self.stop.reason is not None or self.watch.is_weightless(),
        )
        del self.tickets[step]
        check_losses(result, self._request(step, weight_version), self.config.rollout)
        batch = RecordedBatch(result.trajectories, step, weight_version, result.num_dropped)
        check_staleness(batch, self.config.rollout.max_staleness)
        if self.config.run.record is not None:
            batch.save(recorded_batch_path(Path(self.config.run.record), step))
        return batch

    def _submit_ahead(self, step: int, weight_version: int) -> None:
        """Submit ``step`` and those after it whose weights may be the current ones."""
        ahead = min(step + self.config.rollout.max_staleness, self.config.run.steps - 1)
        first = max(self.tickets, default=step - 1) + 1
        for number in range(first, ahead + 1):
            self.tickets[number] = self.pool.submit(self._request(number, weight_version))

    def _request(self, step: int, weight_version: int) -> RolloutRequest:
        algorithm, rollout = self.config.algorithm, self.config.rollout
        num_prompts = algorithm.prompts_per_step + rollout.spare_prompts
        return RolloutRequest(
            prompts=tuple(self.prompts.batch(step, num_prompts)),
            samples_per_prompt=algorithm.group_size,
            sampling=Sampling(rollout.temperature, rollout.top_p),
            with_teacher=self.config.needs_teacher,
            tools_enabled=self.config.tools.enabled,
            spare_prompts=rollout.spare_prompts,
            weight_version=weight_version,
        )


def check_staleness(batch: RecordedBatch, max_staleness: int) -> None:
    """Refuse tokens that were sampled by weights older than allowed.

    Raises:
        RolloutError: some were.
    """
    staleness = int(batch.staleness.max(initial=0))
    if staleness > max_staleness:
        raise RolloutError(
            f"step {batch.step} is trained with weight version {batch.weight_version}, but "
            f"weights {staleness} versions older sampled some of its tokens; "
            f"rollout.max_staleness allows {max_staleness}: an engine has lost its weights"
        )


@dataclass(frozen=True)
class ReplaySource:
    """Reads recorded batches: one file for every step, or a folder with one file a step."""

    path: Path

    def batch(self, step: int, weight_version: int) -> RecordedBatch:
        """The recorded batch of ``step``.

        Raises:
            ConfigError: the folder has no batch for this step.
        """
        path = recorded_batch_path(self.path, step) if self.path.is_dir() else self.path
        if not path.is_file():
            raise ConfigError(
                f"run.replay is {self.path}: {path.name} is missing there; record that step or "
                f"lower run.steps"
            )
        return RecordedBatch.load(path)
