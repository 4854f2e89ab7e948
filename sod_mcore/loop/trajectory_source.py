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

    def weights_are_published(self, version: int) -> None: ...


class LiveSource:
    """Submits the prompts of a step, and of those that may be sampled ahead, to the pool.

    With ``rollout.max_staleness`` n, a step is submitted as soon as the weights of the step n
    before it are published: they, or newer ones, sample every token of it.

    Attributes:
        watch: interrupts the wait for a batch when an engine needs weights.
    """

    def __init__(
        self,
        pool: RolloutPool,
        prompts: PromptSource,
        config: SodConfig,
        stop: StopRequest,
        watch: EngineWatch,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        self._pool = pool
        self._prompts = prompts
        self._config = config
        self._stop = stop
        self.watch = watch
        self._on_progress = on_progress
        self._tickets: dict[int, Ticket] = {}

    def weights_are_published(self, version: int) -> None:
        """Let the pool begin what these weights may sample, beyond the step that waits for them."""
        if self._config.rollout.max_staleness > 0:
            self._submit_until(version, version)

    def batch(self, step: int, weight_version: int) -> RecordedBatch:
        """The trajectories of step ``step``; written to ``run.record`` where that is set.

        Raises:
            RolloutError: the pool failed, or lost more trajectories than the limits allow, or a
                token is older than ``rollout.max_staleness`` allows.
            RolloutInterruptedError: the run was asked to stop, or an engine waits for its weights;
                the batch goes on, and can be asked for again.
        """
        self._submit_until(step, weight_version)
        result = self._pool.collect(
            self._tickets[step],
            self._config.rollout.deadline_seconds,
            self._on_progress,
            should_stop=lambda: self._stop.reason is not None or self.watch.is_weightless(),
        )
        del self._tickets[step]
        check_losses(result, self._request(step, weight_version), self._config.rollout)
        counts = (result.num_dropped, result.num_retries)
        batch = RecordedBatch(result.trajectories, step, weight_version, *counts)
        check_staleness(batch, self._config.rollout.max_staleness)
        if self._config.run.record is not None:
            batch.save(recorded_batch_path(Path(self._config.run.record), step))
        return batch

    def _submit_until(self, step: int, weight_version: int) -> None:
        """Submit ``step`` and those after it whose weights may be the current ones."""
        last = min(step + self._config.rollout.max_staleness, self._config.run.steps - 1)
        first = max(self._tickets, default=step - 1) + 1
        for number in range(first, last + 1):
            self._tickets[number] = self._pool.submit(self._request(number, weight_version))

    def _request(self, step: int, weight_version: int) -> RolloutRequest:
        algorithm, rollout = self._config.algorithm, self._config.rollout
        num_prompts = algorithm.prompts_per_step + rollout.spare_prompts
        return RolloutRequest(
            prompts=tuple(self._prompts.batch(step, num_prompts)),
            samples_per_prompt=algorithm.group_size,
            sampling=Sampling(rollout.temperature, rollout.top_p),
            with_teacher=self._config.needs_teacher,
            tools_enabled=self._config.tools.enabled,
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

    def weights_are_published(self, version: int) -> None:
        """Nothing depends on them."""

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
