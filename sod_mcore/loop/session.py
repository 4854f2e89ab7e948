"""One rank's view of a run: the steps of the loop as methods.

Methods are collective unless they say otherwise: every rank calls them, rank 0 does the talking.
``opening.py`` makes a session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sod_mcore.algorithm.signals import BatchSignals
from sod_mcore.config import SodConfig
from sod_mcore.data.plan import Plan
from sod_mcore.evaluation.evaluate import evaluate_temperature
from sod_mcore.loop.ending import Ending
from sod_mcore.loop.engine_metrics import EngineMetrics
from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.loop.reporting import Reporter
from sod_mcore.loop.run_prompts import first_of_each_file
from sod_mcore.loop.stop import StopRequest, StopRequested
from sod_mcore.loop.training_examples import first_epoch, indices_in_order, scoring_examples
from sod_mcore.loop.trajectory_source import TrajectorySource
from sod_mcore.loop.weight_sync import WeightSync
from sod_mcore.rollout.pool import RolloutError, RolloutInterruptedError, RolloutPool
from sod_mcore.student.exchange import gather_objects
from sod_mcore.student.rank_zero import on_rank_zero
from sod_mcore.student.student import Student, UpdateResult
from sod_mcore.trajectory import Prompt, RecordedBatch

Result = TypeVar("Result")
Item = TypeVar("Item")

ROLLOUT_MARGIN = timedelta(minutes=5)
"""Beyond the rollout's deadline, so that the deadline's own message is what the user sees."""


@dataclass(frozen=True)
class Rollouts:
    """The pool that plays, and its engines; global rank 0 of a run that does not replay has one.

    Attributes:
        watch: tells of engines that wait for their weights.
        evaluation_prompts: may be empty.
    """

    pool: RolloutPool
    watch: EngineWatch
    evaluation_prompts: tuple[Prompt, ...]


class Session:
    """One rank's view of a run.

    Args:
        source: of trajectories; None on ranks other than 0.
        rollouts: None on ranks other than 0, and where a recorded run is replayed.
        weights: None where a recorded run is replayed.
        reporter: None on ranks other than 0.
    """

    def __init__(
        self,
        config: SodConfig,
        student: Student,
        first_step: int,
        source: TrajectorySource | None,
        rollouts: Rollouts | None,
        weights: WeightSync | None,
        reporter: Reporter | None,
        stop: StopRequest,
        ending: Ending,
    ) -> None:
        self.config = config
        self.student = student
        self.first_step = first_step
        self._source = source
        self._rollouts = rollouts
        self._engine_metrics = EngineMetrics(rollouts.pool, rollouts.watch) if rollouts else None
        self._weights = weights
        self._reporter = reporter
        self._stop = stop
        self._stop_reason: str | None = None
        self._ending = ending
        self._saved_steps = self._completed_steps = first_step
        self._is_evaluation_missing = False
        self._rollout_timeout = timedelta(seconds=config.rollout.deadline_seconds) + ROLLOUT_MARGIN

    def on_rank_zero(self, work: Callable[[], Result], timeout: timedelta | None = None) -> Result:
        """Do ``work`` on global rank 0; its result, or its failure, reaches every rank."""
        return on_rank_zero(work, self.student.layout.world_group, timeout)

    @contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Run the loop; where all ranks agree to stop, it is left and goes on behind this block."""
        with suppress(StopRequested):
            yield

    def begin(self) -> None:
        """Give the engines the weights to start from; evaluate them if they are first or last.

        The last ones are there already when a run was stopped in their evaluation.
        """
        self.publish_weights(self.first_step)
        if self.first_step in (0, self.config.run.steps):
            self.evaluate(self.first_step)
            self._leave_if_stopped()
            self._end_line(self.first_step)

    def collect_trajectories(self, step: int) -> RecordedBatch:
        """The scored trajectories of a step, from the pool or from a recorded batch.

        Raises:
            StopRequested: the run was asked to stop meanwhile; the unfinished batch is given up.
        """
        source = self._source

        def collect() -> RecordedBatch | None:
            assert source is not None
            with suppress(RolloutInterruptedError):
                return source.batch(step, weight_version=step)
            return None

        while True:
            with self._timed("rollout"):
                batch = self.on_rank_zero(collect, self._rollout_timeout)
            self._leave_if_stopped()
            if batch is not None:
                self._let_engines_sleep()
                return batch
            self.publish_weights(step)  # an engine was started again and waits for them

    def _let_engines_sleep(self) -> None:
        """Their GPUs are the trainer's until the next weights are published."""
        if self._weights is None or not self.config.is_colocated:
            return
        with self._timed("engine_sleep"):
            self._weights.let_engines_sleep()
        self._leave_if_stopped()

    def old_logprobs(self, batch: RecordedBatch, plan: Plan) -> list[NDArray[np.float32]]:
        """The student's log-probs at the start of the step; meaningful on rank 0 only.

        Float32 ``[T]`` for each trajectory, NaN outside the mask: recomputed by the trainer over
        the packs of the first epoch, or the rollout engine's own (``algorithm.old_logprobs``).

        Raises:
            StopRequested: the run was asked to stop meanwhile.
        """
        if self.config.algorithm.old_logprobs == "rollout":
            return [t.rollout_logprobs for t in batch.trajectories]
        with self._timed("old_logprobs"):
            values: list[NDArray[np.float32]] = [
                np.full(len(t), np.nan, np.float32) for t in batch.trajectories
            ]
            for mini_batch in first_epoch(plan, self.config.algorithm.epochs):
                self._leave_if_stopped()
                examples = scoring_examples(
                    batch.trajectories, mini_batch, self.student.layout.data_parallel_rank
                )
                computed = self.student.compute_logprobs(examples)
                if computed is not None:
                    indices = indices_in_order(mini_batch)
                    for index, logprobs in zip(indices, computed, strict=True):
                        values[index] = logprobs
            return values

    def publish_weights(self, version: int) -> None:
        """Send the current weights to the student's engines, if they will play again.

        Nothing to do when replaying; nor when stopping, so that a fault there costs no step.
        """
        if self._weights is None or self._agree_to_stop() is not None:
            return
        with self._timed("weight_sync"):
            difference = self._weights.publish(version)
        if difference is None:
            return
        self._note({"weights/probe_difference": difference})
        if self.config.rollout.max_staleness > 0:
            self.on_rank_zero(partial(self._let_source_begin, version))

    def _let_source_begin(self, version: int) -> None:
        assert self._source is not None
        self._source.weights_are_published(version)

    def evaluate(self, step: int) -> None:
        """Solve the evaluation problems with the published weights; nothing when replaying.

        All prompts before the first and after the last step, ``evaluation.max_prompts`` of each
        file between.
        Given up without a result when the run is asked to stop.
        """
        if self._weights is None or not self.config.evaluation.data_files:
            return

        is_between = 0 < step < self.config.run.steps
        count = self.config.evaluation.max_prompts if is_between else None

        def evaluate_at(temperature: float) -> dict[str, float] | None:
            assert self._rollouts is not None
            watch = self._rollouts.watch
            with suppress(RolloutInterruptedError):
                result = evaluate_temperature(
                    self._rollouts.pool,
                    first_of_each_file(self._rollouts.evaluation_prompts, count),
                    temperature,
                    self.config.evaluation,
                    self.config.rollout,
                    tools_enabled=self.config.tools.enabled,
                    weight_version=step,
                    should_stop=lambda: self._stop.reason is not None or watch.is_weightless(),
                )
                return result.metrics()
            return None

        metrics: dict[str, float] = {}
        with self._timed("evaluation"):
            # One at a time: each has the rollout's deadline, and so has the wait of the others.
            temperatures = deque(self.config.evaluation.temperatures)
            while temperatures and self._agree_to_stop() is None:
                work = partial(evaluate_at, temperatures[0])
                found = self.on_rank_zero(work, self._rollout_timeout)
                if found is not None:
                    metrics |= found
                    temperatures.popleft()
                elif self._agree_to_stop() is None:
                    self.publish_weights(step)  # an engine was started again and waits for them
        self._is_evaluation_missing = self._agree_to_stop() is not None
        if self._reporter is not None and not self._is_evaluation_missing:
            self._reporter.evaluation(metrics)

    def report(
        self,
        step: int,
        batch: RecordedBatch,
        signals: BatchSignals,
        updates: Sequence[UpdateResult],
    ) -> None:
        """Write the step's metrics and table (rank 0)."""
        if self._reporter is not None:
            self._reporter.step(step, batch, signals, updates)

    def end_step(self, completed_steps: int) -> None:
        """Save and evaluate where due.

        Raises:
            StopRequested: the run was asked to stop; all that is done is saved.
        """
        self._completed_steps = self._ending.completed_steps = completed_steps
        config, is_last = self.config, completed_steps == self.config.run.steps
        should_stop = self._agree_to_stop() is not None
        # Saved first: an evaluation that fails must not cost what was learned.
        if should_stop or is_last or _is_multiple(completed_steps, config.run.save_every):
            self.save_checkpoint()
        if is_last or (not should_stop and _is_multiple(completed_steps, config.evaluation.every)):
            self.evaluate(completed_steps)
        self._end_line(completed_steps)
        self._leave_if_stopped()

    def finish(self) -> None:
        """Save what has not been saved, export finished weights, and say how the run ended."""
        if self._saved_steps != self._completed_steps:
            self.save_checkpoint()
        is_done = self._completed_steps >= self.config.run.steps
        if self.config.run.export is not None and is_done:
            self.student.export_hf(self.config.run.export)
        is_finished = is_done and not self._is_evaluation_missing
        if is_finished:
            self._ending.succeed("finished", "all steps are done")
        else:
            self._ending.succeed("stopped", self._stop_reason or "asked to stop")
        if self._reporter is not None:
            self._reporter.end(self._completed_steps, self.config.run.steps, self._stop_reason)
            self._stop.clear()

    def _agree_to_stop(self) -> str | None:
        """Why the run is to end, the same on every rank; once agreed it stays so. Collective."""
        if self._stop_reason is None:
            reasons = gather_objects(self._stop.reason, self.student.layout.world_group)
            self._stop_reason = next((reason for reason in reasons if reason is not None), None)
        return self._stop_reason

    def _leave_if_stopped(self) -> None:
        if self._agree_to_stop() is not None:
            raise StopRequested

    def save_checkpoint(self) -> None:
        """Write everything that the next start needs to go on."""
        directory = Path(self.config.run.directory) / "checkpoints"
        with self._timed("checkpoint"):
            self.student.save_checkpoint(
                directory,
                self._completed_steps,
                {"step": self._completed_steps},
                keep=self.config.run.keep_checkpoints,
            )
        self._saved_steps = self._completed_steps

    def progress_bar(self, items: Sequence[Item], label: str) -> Iterable[Item]:
        """``items``, with a progress bar on rank 0; time is booked under ``label``."""
        with self._timed(label):
            yield from self._reporter.progress(items, label) if self._reporter else items

    def _end_line(self, completed_steps: int) -> None:
        """Write the metrics, with what the pool has done until now (rank 0)."""
        if self._reporter is not None:
            if self._rollouts is not None and self._engine_metrics is not None:
                with suppress(RolloutError):  # whoever needs the pool again will say so
                    self._rollouts.pool.hear()
                self._note(self._engine_metrics.since_last_line())
            self._reporter.end_line(completed_steps)

    def _note(self, metrics: dict[str, float]) -> None:
        if self._reporter is not None:
            self._reporter.note(metrics)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        if self._reporter is None:
            yield
        else:
            with self._reporter.timed(phase):
                yield


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
