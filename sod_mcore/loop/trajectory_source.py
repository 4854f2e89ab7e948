"""Where a step's trajectories come from: live rollouts, or a recorded batch.

Both give the same type, so the trainer does not know which one it reads. Used by global rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sod_mcore.config import ConfigError, SodConfig
from sod_mcore.data.prompts import PromptSource
from sod_mcore.loop.stop import StopRequest
from sod_mcore.rollout.batch import RolloutProgress, RolloutRequest
from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.pool import RolloutPool, check_losses
from sod_mcore.trajectory import RecordedBatch, recorded_batch_path

ProgressCallback = Callable[[RolloutProgress], None]


class TrajectorySource(Protocol):
    """Gives each step its trajectories."""

    def batch(self, step: int, weight_version: int) -> RecordedBatch: ...


@dataclass(frozen=True)
class LiveSource:
    """Submits a step's prompts to the pool and collects the scored trajectories."""

    pool: RolloutPool
    prompts: PromptSource
    config: SodConfig
    stop: StopRequest
    on_progress: ProgressCallback | None = None

    def batch(self, step: int, weight_version: int) -> RecordedBatch:
        """Roll out step ``step``; written to ``run.record`` where that is set.

        Raises:
            RolloutError: the pool failed, or lost more trajectories than the limits allow.
            RolloutInterruptedError: the run was asked to stop.
        """
        request = self._request(step)
        self.pool.submit(request)
        result = self.pool.collect(
            self.config.rollout.deadline_seconds,
            self.on_progress,
            should_stop=lambda: self.stop.reason is not None,
        )
        check_losses(result, request, self.config.rollout)
        batch = RecordedBatch(result.trajectories, step, weight_version, result.num_dropped)
        if self.config.run.record is not None:
            batch.save(recorded_batch_path(Path(self.config.run.record), step))
        return batch

    def _request(self, step: int) -> RolloutRequest:
        algorithm, rollout = self.config.algorithm, self.config.rollout
        return RolloutRequest(
            prompts=tuple(self.prompts.batch(step, algorithm.prompts_per_step)),
            samples_per_prompt=algorithm.group_size,
            sampling=Sampling(rollout.temperature, rollout.top_p),
            with_teacher=self.config.needs_teacher,
            tools_enabled=self.config.tools.enabled,
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
