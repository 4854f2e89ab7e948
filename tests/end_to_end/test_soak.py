"""A run of sixty steps in which processes die at random ends like runs in which none does."""

from __future__ import annotations

import copy
import random
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.serving.fleet.state import ServerState
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.drills import Drill, drill, send, steps_of
from tests.end_to_end.engine_drills import process_of, server
from tests.end_to_end.programs import metrics, torchrun, write_config

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

STEPS, LAST_STEPS = 60, 20
KILLS = 15
VICTIMS = ("student_engine_0", "student_engine_0", "teacher_engine_0", "student_router")
"""Chosen from at random."""
SEEDS = (1, 2, 3)
RUN_SECONDS = 1500.0
MEASURED = ("reward/solved", "distillation/reverse_kl")
SPREADS = 4.0
"""Standard deviations over the seeds that the disturbed run may be away from their mean."""


@dataclass(frozen=True)
class Soak:
    """Metric lines of the undisturbed runs, and of the disturbed one with what it printed."""

    undisturbed: tuple[list[dict[str, Any]], ...]
    disturbed: list[dict[str, Any]]
    kills: int
    output: str


@pytest.fixture(scope="module")
def soak(live_run: LiveRun, tmp_path_factory: pytest.TempPathFactory) -> Soak:
    folder = tmp_path_factory.mktemp("soak")
    undisturbed = tuple(
        play(live_run, folder / f"seed_{seed}", seed, lambda it: None)[0] for seed in SEEDS
    )
    killer = RandomKiller(random.Random(0))
    disturbed, output = play(live_run, folder / "disturbed", SEEDS[0], killer.attack)
    return Soak(undisturbed, disturbed, killer.kills, output)


def play(
    live_run: LiveRun, folder: Path, seed: int, during: Callable[[Drill], None]
) -> tuple[list[dict[str, Any]], str]:
    """One run with its own engines; ``during`` is called while it runs."""
    folder.mkdir()
    config = write_config(folder / "sod.yaml", configuration(live_run, folder / "run", seed))
    serve = [sys.executable, "-m", "sod_mcore.serving", str(config)]
    command = [*serve, "--", *torchrun(2, "pretrain_sod.py", str(config))]
    with drill(command, folder / "run", folder) as it:
        during(it)
        code = it.process.wait(timeout=RUN_SECONDS)
        assert code == 0, it.output()[-6000:]
        return metrics(folder / "run")[1:], it.output()


def configuration(live_run: LiveRun, run: Path, seed: int) -> dict[str, Any]:
    tree: dict[str, Any] = copy.deepcopy(live_run.tree)
    tree["run"] = {"directory": str(run), "steps": STEPS, "save_every": 0, "seed": seed}
    tree["algorithm"] |= {"prompts_per_step": 8, "prompts_per_mini_batch": 4, "topk": {"k": 0}}
    tree["optimizer"]["lr"] = 2e-4
    tree["serving"] |= {"max_restarts": KILLS, "restart_timeout_seconds": 600.0}
    tree["rollout"]["max_staleness"] = 0
    tree["evaluation"] = {}
    tree["report"] = {"wandb": "disabled"}
    return tree


class RandomKiller:
    """Kills processes of the fleet at random steps, each once the one before is back."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.kills = 0

    def attack(self, it: Drill) -> None:
        """Until all kills are done."""
        for step in sorted(self._chance.sample(range(1, STEPS - 2), KILLS)):
            it.wait_until(partial(_has_done, it, step), RUN_SECONDS)
            before = server(it, self._chance.choice(VICTIMS))
            send(process_of(before), signal.SIGKILL)
            self.kills += 1
            it.wait_until(partial(_is_back, it, before), RUN_SECONDS)


def _has_done(it: Drill, step: int) -> bool:
    return step in steps_of(it.run_directory)


def _is_back(it: Drill, before: ServerState) -> bool:
    now = server(it, before.name)
    return now.restarts > before.restarts and now.state == "ready"


def test_it_ends_like_undisturbed_runs(
    soak: Soak, record_property: Callable[[str, object], None]
) -> None:
    assert soak.kills == KILLS
    assert [line["step"] for line in soak.disturbed] == list(range(1, STEPS + 1))
    assert sum(line["serving/restarts"] for line in soak.disturbed) == KILLS
    assert sum(line["rollout/dropped"] + line["rollout/unscored"] for line in soak.disturbed) == 0
    for name in MEASURED:
        of_seeds = [last_mean(lines, name) for lines in soak.undisturbed]
        own = last_mean(soak.disturbed, name)
        record_property(name, f"{own:.3f}")
        record_property(f"{name}_undisturbed", " ".join(f"{value:.3f}" for value in of_seeds))
        spread = SPREADS * statistics.stdev(of_seeds)
        assert abs(own - statistics.mean(of_seeds)) <= spread, (name, own, of_seeds)


def last_mean(lines: list[dict[str, Any]], name: str) -> float:
    """Mean over the last steps."""
    return statistics.mean(line[name] for line in lines[-LAST_STEPS:])
