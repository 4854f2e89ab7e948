"""Draws the samples that are missing, a chunk at a time, and keeps each chunk when it is done.

Two pools work at the same time, each on a chunk of its own: while the last long conversations of
one chunk run out, the engines are busy with the other.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from sod_mcore.config import BenchmarkConfig, RolloutConfig
from sod_mcore.evaluation.data_sets import DataSet
from sod_mcore.evaluation.samples import Sample, SampleStore, sample_of
from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.pool import RolloutError, RolloutPool
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.trajectory import Prompt


@dataclass(frozen=True)
class Chunk:
    """Problems that miss equally many samples of one seed."""

    seed: int
    prompts: tuple[Prompt, ...]
    samples: int


def plan_chunks(
    data_sets: Sequence[DataSet],
    benchmark: BenchmarkConfig,
    store: SampleStore,
    chunk_trajectories: int,
) -> list[Chunk]:
    """What is missing in ``store``, in chunks of ``chunk_trajectories`` samples or a little more;
    the last of those that miss equally many may be smaller.

    Seeds come one after the other, so that a stopped evaluation has whole ones.
    """
    prompts = [prompt for data_set in data_sets for prompt in data_set.prompts]
    return [
        chunk
        for seed in benchmark.seeds
        for chunk in _plan_seed(prompts, seed, benchmark.samples, store, chunk_trajectories)
    ]


def _plan_seed(
    prompts: Sequence[Prompt], seed: int, samples: int, store: SampleStore, chunk_trajectories: int
) -> Iterator[Chunk]:
    def missing(prompt: Prompt) -> int:
        return len(_free_indices(store, seed, prompt.prompt_id, samples))

    for count, group in itertools.groupby(sorted(prompts, key=missing), key=missing):
        if count == 0:
            continue
        size = -(-chunk_trajectories // count)
        for chunk in _batched(tuple(group), size):
            yield Chunk(seed, chunk, count)


class Runner:
    """Samples chunks on pools into a store."""

    def __init__(
        self,
        data_sets: Sequence[DataSet],
        benchmark: BenchmarkConfig,
        rollout: RolloutConfig,
        store: SampleStore,
        *,
        tools_enabled: bool = True,
    ) -> None:
        self._benchmark = benchmark
        self._rollout = rollout
        self._store = store
        self._tools_enabled = tools_enabled
        self._data_set_of = {
            prompt.prompt_id: data_set.name for data_set in data_sets for prompt in data_set.prompts
        }
        self._wanted = len(self._data_set_of) * len(benchmark.seeds) * benchmark.samples
        self._num_dropped = 0

    def run(
        self,
        pools: Sequence[RolloutPool],
        chunks: Sequence[Chunk],
        on_kept: Callable[[Sequence[Sample]], None],
        on_finished: Callable[[int], None] = lambda count: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Sample every chunk.

        Args:
            pools: each works on one chunk at a time.
            chunks: what is missing.
            on_kept: hears of samples that are on disk.
            on_finished: hears how many samples of chunks under way are finished; from a thread.
            should_stop: asks for an early end.

        Raises:
            RolloutError: a pool failed, or more than ``rollout.max_dropped_fraction`` of the whole
                evaluation's samples were lost; what the pools brought is kept.
            RolloutInterruptedError: ``should_stop`` became true.
        """
        has_failed = threading.Event()
        finished = [0] * len(pools)

        def sample(number: int, chunk: Chunk) -> RolloutResult:
            def hear(progress: RolloutProgress) -> None:
                finished[number] = progress.finished
                on_finished(sum(finished))

            ticket = pools[number].submit(self._request(chunk))
            return pools[number].collect(
                ticket,
                self._rollout.deadline_seconds,
                on_progress=hear,
                should_stop=lambda: has_failed.is_set() or should_stop(),
            )

        idle = list(range(len(pools)))
        running: dict[Future[RolloutResult], tuple[int, Chunk]] = {}
        waiting = list(reversed(chunks))
        with ThreadPoolExecutor(len(pools)) as executor:
            try:
                while waiting or running:
                    while waiting and idle:
                        number, chunk = idle.pop(), waiting.pop()
                        running[executor.submit(sample, number, chunk)] = (number, chunk)
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    # Those that failed come last: what the others brought is kept first.
                    for future in sorted(done, key=lambda future: future.exception() is not None):
                        number, chunk = running.pop(future)
                        kept = self._keep(chunk, future.result())
                        finished[number] = 0
                        on_kept(kept)
                        idle.append(number)
            finally:
                has_failed.set()

    def _keep(self, chunk: Chunk, result: RolloutResult) -> list[Sample]:
        samples = self._name_samples(chunk, result)
        self._store.append(samples)
        self._count_losses(result)
        return samples

    def _count_losses(self, result: RolloutResult) -> None:
        """Losses count against the whole evaluation: a chunk may be a single sample."""
        self._num_dropped += result.num_dropped
        allowed = self._rollout.max_dropped_fraction
        if self._num_dropped > allowed * self._wanted:
            causes = "; ".join(result.failures) or "no cause recorded"
            raise RolloutError(
                f"{self._num_dropped} of {self._wanted} samples lost, more than "
                f"rollout.max_dropped_fraction={allowed} allows. Causes: {causes}"
            )

    def _name_samples(self, chunk: Chunk, result: RolloutResult) -> list[Sample]:
        """Give each trajectory the next free index of its problem."""
        free = {
            prompt.prompt_id: _free_indices(
                self._store, chunk.seed, prompt.prompt_id, self._benchmark.samples
            )
            for prompt in chunk.prompts
        }
        return [
            sample_of(
                trajectory,
                data_set=self._data_set_of[trajectory.group_id],
                seed=chunk.seed,
                index=free[trajectory.group_id].pop(0),
                temperature=self._benchmark.temperature,
            )
            for trajectory in result.trajectories
        ]

    def _request(self, chunk: Chunk) -> RolloutRequest:
        return RolloutRequest(
            prompts=chunk.prompts,
            samples_per_prompt=chunk.samples,
            sampling=Sampling(self._benchmark.temperature, self._benchmark.top_p),
            with_teacher=False,
            tools_enabled=self._tools_enabled,
        )


def _free_indices(store: SampleStore, seed: int, prompt_id: str, samples: int) -> list[int]:
    taken = store.taken(seed, prompt_id)
    return [index for index in range(samples) if index not in taken]


def _batched(prompts: tuple[Prompt, ...], size: int) -> Iterator[tuple[Prompt, ...]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
