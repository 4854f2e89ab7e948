"""Opens everything that a run holds, in the right order; it is closed in the reverse one.

The rollout pool starts before torch.distributed (it is no rank), the engines are reached before the
model is built, and whatever was opened is closed when the program ends, however it ends.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path

import torch

from sod_mcore.config import SodConfig
from sod_mcore.data.prompts import PromptSource
from sod_mcore.loop.ending import Ending
from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.loop.reporting import Reporter
from sod_mcore.loop.run_prompts import RunPrompts
from sod_mcore.loop.session import Rollouts, Session
from sod_mcore.loop.stop import StopRequest
from sod_mcore.loop.trajectory_source import LiveSource, ReplaySource, TrajectorySource
from sod_mcore.loop.weight_sync import WeightSync, probe_token_ids
from sod_mcore.report.step_timeline import StepTimeline
from sod_mcore.rollout.open_pool import open_pool
from sod_mcore.rollout.pool import PoolSettings
from sod_mcore.serving.endpoints import Endpoints, read_endpoints
from sod_mcore.serving.sleep import EngineSleep
from sod_mcore.serving.weights.kept_groups import KeptGroups
from sod_mcore.student.backend import choose_backend
from sod_mcore.student.model_config import check_layout
from sod_mcore.student.parallel_state import distributed
from sod_mcore.student.student import Student


def open_session(config: SodConfig, prompts: RunPrompts, ending: Ending) -> Session:
    """Start the pool, torch.distributed and the student; they are closed when the program ends.

    Args:
        prompts: what ``check_before_launch`` read; empty on ranks other than 0.
    """
    directory, stack = Path(config.run.directory), ending.stack
    is_rank_zero = os.environ.get("RANK", "0") == "0"
    is_live = config.run.replay is None
    endpoints = read_endpoints(config.serving_directory) if is_live and is_rank_zero else None
    timeline = StepTimeline(directory, trace_every=config.report.trace_every)
    pool = None
    if endpoints is not None:
        pool = stack.enter_context(open_pool(pool_settings(config, prompts.sources), timeline.add))
    timeout = timedelta(seconds=config.run.collective_timeout_seconds)
    sizes = check_layout(config.student, int(os.environ["WORLD_SIZE"]))
    stack.enter_context(distributed(sizes, seed=config.run.seed, timeout=timeout))
    student, first_step = _open_student(config)
    ending.completed_steps = first_step
    reporter = None
    if is_rank_zero:
        reporter = stack.enter_context(Reporter.open(config, first_step, timeline))
        reporter.say(choose_backend(config.student).describe())
    stop = StopRequest(
        Path(config.run.stop_file or directory / "stop"),
        config.run.stop_grace_seconds,
        on_overdue=ending.record_forced_end,
    )
    ending.begin(stop)
    rollouts = None
    if pool is not None:
        rollouts = Rollouts(pool, _open_watch(config, stop), tuple(prompts.evaluation))
    sleep = None
    if config.is_colocated and endpoints is not None:
        sleep = stack.enter_context(closing(_open_sleep(config, endpoints, timeline, stop)))
    if config.is_colocated:
        stack.callback(torch.cuda.empty_cache)  # before that wakes engines that are still asleep
    return Session(
        config,
        student,
        first_step,
        _open_source(config, prompts, rollouts, reporter, stop) if is_rank_zero else None,
        rollouts,
        _open_weight_sync(config, student, endpoints, rollouts, sleep, stack) if is_live else None,
        reporter,
        stop,
        ending,
    )


def pool_settings(config: SodConfig, sources: Sequence[str]) -> PoolSettings:
    """What the pool is told at its start; ``sources`` are the prompts' data sources."""
    assert config.serving is not None
    return PoolSettings(
        run_directory=Path(config.run.directory),
        serving_directory=config.serving_directory,
        student_path=Path(config.student.model_path),
        serving=config.serving,
        rollout=config.rollout,
        tools=config.tools,
        reward=config.reward,
        chat=config.chat,
        teacher=config.teacher,
        teacher_top_k=config.algorithm.topk.k,
        sources=tuple(sources),
    )


def _open_student(config: SodConfig) -> tuple[Student, int]:
    student = Student.build(
        config.student,
        config.optimizer,
        config.ddp,
        total_updates=config.run.steps * config.algorithm.updates_per_step,
        seed=config.run.seed,
        average_decay=config.teacher.average_decay if config.averages_weights else None,
    )
    if config.run.resume == "auto":
        progress = student.load_checkpoint(Path(config.run.directory) / "checkpoints")
        if progress is not None:
            return student, int(progress["step"])
    student.load_hf(Path(config.student.model_path))
    return student, 0


def _open_source(
    config: SodConfig,
    prompts: RunPrompts,
    rollouts: Rollouts | None,
    reporter: Reporter | None,
    stop: StopRequest,
) -> TrajectorySource:
    if config.run.replay is not None:
        return ReplaySource(Path(config.run.replay))
    assert rollouts is not None
    source = PromptSource(prompts.train, config.run.seed)
    on_progress = reporter.rollout_progress if reporter is not None else None
    return LiveSource(rollouts.pool, source, config, stop, rollouts.watch, on_progress)


def _open_watch(config: SodConfig, stop: StopRequest) -> EngineWatch:
    assert config.serving is not None
    return EngineWatch(
        config.serving_directory,
        config.serving.restart_timeout_seconds,
        should_stop=lambda: stop.reason is not None,
    )


def _open_sleep(
    config: SodConfig, endpoints: Endpoints, timeline: StepTimeline, stop: StopRequest
) -> EngineSleep:
    assert config.serving is not None
    return EngineSleep(
        endpoints,
        config.serving,
        config.serving_directory,
        note=timeline.note,
        should_stop=lambda: stop.reason is not None,
        free_memory=torch.cuda.empty_cache,
    )


def _open_weight_sync(
    config: SodConfig,
    student: Student,
    endpoints: Endpoints | None,
    rollouts: Rollouts | None,
    sleep: EngineSleep | None,
    stack: ExitStack,
) -> WeightSync:
    assert config.serving is not None
    groups = None
    if config.serving.weight_sync == "distributed" and endpoints is not None:
        timeout = config.serving.request_timeout_seconds
        groups = stack.enter_context(closing(KeptGroups(endpoints, student.layout.device, timeout)))
    return WeightSync(
        student=student,
        endpoints=endpoints,
        watch=rollouts.watch if rollouts is not None else None,
        serving=config.serving,
        tolerance=config.probe_tolerance,
        directory=Path(config.run.directory) / "weights",
        probe_ids=probe_token_ids(student.vocab_size, config.run.seed),
        group=student.layout.world_group,
        teacher_follows=config.averages_weights,
        groups=groups,
        sleep=sleep,
    )
