"""How much of the teacher's scoring the rollout hides.

    .venv/bin/python -m benchmarks.scoring_overlap [--teacher scripted] [--delay 0.12]

The arithmetic example's teacher plays its problems greedily, so that every rollout is the same
work. Scores come ``--delay`` seconds late: from an engine behind a proxy (``--teacher engine``),
which takes the rollout's cores, or from a server that answers by itself (``scripted``), as if the
teacher were on another machine. Three things are measured in turn: a batch without scores, a batch
with scores, and the scores of a finished batch alone, with as many connections. What is hidden is

    1 - (with scores - without) / (scores alone).

No more can be hidden than the rollout lasts, and the score of the last trajectory never is: a delay
at which the scores alone take longer than the rollout measures that, and not the overlap.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.delayed_teacher import Answering, EngineAnswers, ScriptedAnswers, delayed
from benchmarks.served_example import CONFIG, run_while_served, settings
from sod_mcore.config import SodConfig
from sod_mcore.config_file import load_config
from sod_mcore.data import read_prompts
from sod_mcore.loop.opening import pool_settings
from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.pool import RolloutPool
from sod_mcore.rollout.process_pool import ProcessPool
from sod_mcore.rollout.request import RolloutRequest
from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.scoring import score
from sod_mcore.serving.endpoints import Endpoints, read_endpoints, write_endpoints
from sod_mcore.trajectory import Prompt, Trajectory

PROMPTS = 256
CONNECTIONS = 8
"""Open requests to each model, and conversations at a time."""
SERIAL = (f"serving.max_connections={CONNECTIONS}", f"rollout.concurrency={CONNECTIONS}")
COLLECT_SECONDS = 600.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Times:
    """Seconds of one repetition."""

    without_scores: float
    with_scores: float
    scores_alone: float

    @property
    def hidden(self) -> float:
        """Share of the scoring that the rollout hides."""
        return 1 - (self.with_scores - self.without_scores) / self.scores_alone


def main() -> None:
    """Print one Markdown row for each repetition, and the median."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", choices=("scripted", "engine"), default="scripted")
    parser.add_argument("--delay", type=float, default=0.12, help="seconds")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--served", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.served is not None:
        measure(options.served, options.teacher, options.delay, options.repetitions)
        return
    run_while_served("benchmarks.scoring_overlap", sys.argv[1:], PROMPTS, SERIAL)


def measure(folder: Path, teacher: str, delay_seconds: float, repetitions: int) -> None:
    """Measure on engines that run, and print the table."""
    config = load_config(SodConfig, CONFIG, [*settings(folder), *SERIAL])
    prompts = tuple(read_prompts(Path(config.data.train)))[:PROMPTS]
    with ExitStack() as stack:
        endpoints = read_endpoints(folder)
        answering = answers_of(teacher, endpoints.model("teacher").engines[0])
        late = with_teacher_at(endpoints, stack.enter_context(delayed(answering, delay_seconds)))
        write_endpoints(late, folder / "late")
        sources = sorted({prompt.data_source for prompt in prompts})
        in_pool = dataclasses.replace(
            pool_settings(config, sources), serving_directory=folder / "late"
        )
        pool = stack.enter_context(ProcessPool(in_pool))
        play(pool, prompts, with_teacher=True)  # what is done once and for all
        rows = [repetition(pool, prompts, late) for _ in range(repetitions)]
    print_table(rows, teacher, delay_seconds)


def answers_of(teacher: str, engine_url: str) -> Answering:
    """Who answers."""
    return ScriptedAnswers() if teacher == "scripted" else EngineAnswers(engine_url)


def with_teacher_at(endpoints: Endpoints, url: str) -> Endpoints:
    """The same fleet with another address for the teacher's only engine."""
    teacher = dataclasses.replace(endpoints.model("teacher"), route=url, engines=(url,))
    return dataclasses.replace(endpoints, models={**endpoints.models, "teacher": teacher})


def repetition(pool: RolloutPool, prompts: Sequence[Prompt], endpoints: Endpoints) -> Times:
    """The three times."""
    without, trajectories = timed(lambda: play(pool, prompts, with_teacher=False))
    with_scores, _ = timed(lambda: play(pool, prompts, with_teacher=True))
    alone, _ = timed(lambda: asyncio.run(score_all(endpoints, trajectories)))
    return Times(without, with_scores, alone)


def play(
    pool: RolloutPool, prompts: Sequence[Prompt], *, with_teacher: bool
) -> tuple[Trajectory, ...]:
    """A greedy batch of one sample a prompt."""
    request = RolloutRequest(tuple(prompts), 1, Sampling(0.0, 1.0), with_teacher=with_teacher)
    result = pool.collect(pool.submit(request), COLLECT_SECONDS)
    assert len(result.trajectories) == len(prompts), result.failures
    assert result.num_unscored == 0, result.failures
    return result.trajectories


async def score_all(endpoints: Endpoints, trajectories: Sequence[Trajectory]) -> None:
    """Score finished trajectories, as many at a time as the pool has connections."""
    async with EngineClient(endpoints, max_connections=CONNECTIONS) as client:
        await asyncio.gather(
            *(score(client, "teacher", t.token_ids, t.prompt_length) for t in trajectories)
        )


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that ``work`` takes, and its result."""
    started = time.monotonic()
    result = work()
    return time.monotonic() - started, result


def print_table(rows: Sequence[Times], teacher: str, delay_seconds: float) -> None:
    """Each repetition, and the median of what is hidden."""
    print(
        f"\n{PROMPTS} trajectories, {CONNECTIONS} at a time, teacher ({teacher}) "
        f"{delay_seconds:g} s away:\n"
    )
    print("| without scores, s | with scores, s | scores alone, s | hidden |")
    print("|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.without_scores:.1f} | {row.with_scores:.1f} | {row.scores_alone:.1f} | "
            f"{row.hidden:.0%} |"
        )
    print(f"| | | median | {statistics.median(row.hidden for row in rows):.0%} |", flush=True)


if __name__ == "__main__":
    main()
