"""A whole evaluation: read, check, serve, sample what is missing, tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sod_mcore.config import EvalConfig, TeacherConfig
from sod_mcore.evaluation import tables
from sod_mcore.evaluation.data_sets import DataSet, read_data_sets, sources_of
from sod_mcore.evaluation.engines import ShouldStop, with_engines
from sod_mcore.evaluation.preflight import (
    check_context_length,
    check_prompts,
    check_settings,
    sample_settings,
)
from sod_mcore.evaluation.results import Result, summarise_samples
from sod_mcore.evaluation.runner import Chunk, Runner, plan_chunks
from sod_mcore.evaluation.samples import SAMPLES_FILE, Sample, SampleStore, read_samples
from sod_mcore.files import write_text
from sod_mcore.report import Progress
from sod_mcore.report.wandb_mirror import WandbMirror
from sod_mcore.rollout.open_pool import open_pool
from sod_mcore.rollout.pool import PoolSettings, RolloutPool
from sod_mcore.serving.endpoints import Endpoints

POOLS = 2
"""Pools that work at the same time, each on a chunk of its own."""
RESULTS_FILE = "results.jsonl"
TABLE_FILE = "results.md"


def evaluate_benchmarks(config: EvalConfig, say: Callable[[str], None]) -> list[Result]:
    """Draw the samples that ``evaluation.output`` does not hold yet, and write the results there.

    Raises:
        ConfigError, DataError: a setting or a file is wrong; nothing was started.
        FleetError: the model could not be served, or an engine died too often.
        RolloutError: a pool failed, or lost too many samples.
        RolloutInterruptedError: a signal came. Samples of finished chunks are kept, whatever is
            raised.
    """
    check_settings(config)
    data_sets = read_data_sets(config.evaluation)
    check_prompts(config, data_sets)
    folder = Path(config.evaluation.output)
    with SampleStore(folder, sample_settings(config, data_sets)) as store:
        chunk_trajectories = config.evaluation.chunk_trajectories or config.rollout.concurrency
        chunks = plan_chunks(data_sets, config.evaluation, store, chunk_trajectories)
        if chunks:
            _draw(config, data_sets, chunks, store, say)
        results = summarise_samples(
            data_sets,
            config.evaluation.seeds,
            config.evaluation.samples,
            read_samples(folder / SAMPLES_FILE),
        )
        _tell(config, results, say)
    return results


def _draw(
    config: EvalConfig,
    data_sets: Sequence[DataSet],
    chunks: Sequence[Chunk],
    store: SampleStore,
    say: Callable[[str], None],
) -> None:
    total = sum(len(chunk.prompts) * chunk.samples for chunk in chunks)
    say(f"{total} samples to draw, in {len(chunks)} chunks")
    benchmark = config.evaluation
    runner = Runner(data_sets, benchmark, config.rollout, store, tools_enabled=config.tools.enabled)

    def work(endpoints: Endpoints, should_stop: ShouldStop) -> None:
        check_context_length(config, endpoints.model("student").context_length)
        with ExitStack() as stack:
            pools = _open_pools(config, sources_of(data_sets), min(POOLS, len(chunks)), stack)
            progress = stack.enter_context(Progress("evaluation", total, unit="samples"))
            kept = right = 0

            def show(count: int) -> None:
                facts = {"right": right / kept} if kept else {}
                progress.advance_to(count, **facts)

            def on_kept(samples: Sequence[Sample]) -> None:
                nonlocal kept, right
                kept += len(samples)
                right += sum(sample.is_correct for sample in samples)
                show(kept)

            runner.run(pools, chunks, on_kept, lambda count: show(kept + count), should_stop)

    with_engines(config, work, say)


def _open_pools(
    config: EvalConfig, sources: tuple[str, ...], count: int, stack: ExitStack
) -> list[RolloutPool]:
    """Pools that work at the same time; Ray's is one, which shares its actors among batches."""
    if config.rollout.pool == "ray":
        return [stack.enter_context(open_pool(pool_settings(config, sources, 1)))] * count
    settings = [pool_settings(config, sources, count)] * count
    return [stack.enter_context(open_pool(s)) for s in settings]


def pool_settings(config: EvalConfig, sources: tuple[str, ...], count: int) -> PoolSettings:
    """Settings of one of ``count`` pools, which together keep to the limits of one."""

    def share(number: int) -> int:
        return -(-number // count)

    rollout, tools, reward = config.rollout, config.tools, config.reward
    return PoolSettings(
        run_directory=Path(config.evaluation.output),
        serving_directory=config.serving_directory,
        student_path=Path(config.serving.student.model_path),
        serving=config.serving,
        rollout=dataclasses.replace(rollout, concurrency=share(rollout.concurrency)),
        tools=dataclasses.replace(
            tools,
            workers=share(tools.workers),
            total_memory_mb=tools.total_memory_mb and max(1, tools.total_memory_mb // count),
        ),
        reward=dataclasses.replace(
            reward, workers=share(reward.workers), code_workers=share(reward.code_workers)
        ),
        chat=config.chat,
        teacher=TeacherConfig(),
        sources=sources,
        teacher_top_k=0,
    )


def _tell(config: EvalConfig, results: Sequence[Result], say: Callable[[str], None]) -> None:
    """Write the tables, send them to W&B, print the Markdown."""
    folder, benchmark = Path(config.evaluation.output), config.evaluation
    settings: dict[str, Any] = {
        "model": config.serving.student.model_path,
        "temperature": benchmark.temperature,
        "top_p": benchmark.top_p,
    }
    table = tables.markdown(results, settings)
    write_text(folder / RESULTS_FILE, tables.json_lines(results, settings))
    write_text(folder / TABLE_FILE, table)
    mirror = WandbMirror(folder, config.report, dataclasses.asdict(config), None)
    mirror.log(0, tables.metrics(results))
    columns, rows = tables.main_table(results)
    mirror.log_table(0, "results", columns, rows)
    mirror.close()
    print(table, flush=True)
    if lost := sum(result.dropped for result in results if not result.data_source):
        say(f"{lost} samples were lost to infrastructure; the same command draws them again")
    say(f"written to {folder / TABLE_FILE}, {RESULTS_FILE} and {SAMPLES_FILE}")
