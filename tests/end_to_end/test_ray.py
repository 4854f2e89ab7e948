"""Live runs whose conversations are played by two Ray actors, one of which is killed.

Real engines, a real Ray of the run's own, torchrun with two ranks.
"""

from __future__ import annotations

import copy
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from sod_mcore.trajectory import RecordedBatch, recorded_batch_path
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.drills import Drill, drill, send, wait_for_rollout
from tests.end_to_end.programs import TEACHER, metrics, torchrun, write_config
from tests.end_to_end.test_live import input_logprobs
from tests.serving.processes import Process, descendants, wait_until_gone

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

SERVE = (sys.executable, "-m", "sod_mcore.serving")
ACTORS = 2
ON_RAY = {"pool": "ray", "ray_address": None, "ray_actors": ACTORS, "ray_actor_cpus": 1}
GROUP_SIZE = 4
STEPS = {"ahead": 2, "killed": 3}
"""Of the run that samples ahead, and of the one that loses an actor."""
PROMPTS = {"ahead": 4, "killed": 32}
KILLED_IN = 1
"""Step, counted from 0, in whose rollout an actor is killed."""
REPLACED_SECONDS = 120.0
"""Longest time from the death of an actor until another has begun in its place."""
GONE_SECONDS = 30.0
PLAYED_SECONDS = 1.0
"""After them a rollout is under way, and far from its end."""

Record = Callable[[str, object], None]


@dataclass(frozen=True)
class RayRun:
    """What a run left behind.

    Attributes:
        folder: of the run.
        initial: the student's weights before the first step.
        exit_code: of torchrun.
        output: all that was printed.
        left: processes that were there in the middle and still ran after the end.
        ray_folder: where its Ray kept its files.
        niceness: of its actors.
    """

    folder: Path
    initial: Path
    exit_code: int
    output: str
    left: frozenset[Process]
    ray_folder: Path
    niceness: frozenset[int]

    def lines(self) -> list[dict[str, Any]]:
        """The metrics of each step."""
        return metrics(self.folder / "run")[1:]

    def batch(self, step: int) -> RecordedBatch:
        return RecordedBatch.load(recorded_batch_path(self.folder / "recordings", step))

    def weights(self, version: int) -> Path:
        """Hugging Face folder of a version; the run itself keeps the newest two."""
        if version == 0:
            return self.initial
        name = f"version_{version:06d}"
        kept = self.folder / name
        return kept if kept.exists() else self.folder / "run" / "weights" / name


@dataclass(frozen=True)
class Replacement:
    """How an actor was replaced: seconds from its death until another one was there."""

    seconds: float


@pytest.fixture(scope="module")
def fleet(live_run: LiveRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Engines for both runs; the folder that tells their addresses."""
    folder = tmp_path_factory.mktemp("fleet")
    tree = copy.deepcopy(live_run.tree)
    tree["run"] = {"directory": str(folder / "run")}
    config = write_config(folder / "sod.yaml", tree)
    with drill([*SERVE, str(config)], folder / "run", folder) as it:
        it.wait_for_text("addresses written")
        yield folder / "run"
        send(it.process, signal.SIGTERM)
        it.process.wait(timeout=60)


@pytest.fixture(scope="module")
def ahead(live_run: LiveRun, fleet: Path, tmp_path_factory: pytest.TempPathFactory) -> RayRun:
    """Samples a step ahead, few conversations at a time: the second batch is under way when the
    weights change."""
    folder = tmp_path_factory.mktemp("ahead")
    tree = configuration(live_run, fleet, folder, "ahead")
    tree["rollout"] |= {"max_staleness": 1, "concurrency": ACTORS}
    tree["algorithm"]["tis_cap"] = 2.0
    return play(tree, live_run, folder, "ahead", lambda it: None)


@pytest.fixture(scope="module")
def killed(
    live_run: LiveRun, fleet: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RayRun, Replacement]:
    """Loses an actor in the middle of a rollout."""
    folder = tmp_path_factory.mktemp("killed")
    replacements: list[Replacement] = []

    def kill_one(it: Drill) -> None:
        wait_for_rollout(it, KILLED_IN)
        name = f"version_{KILLED_IN:06d}"
        shutil.copytree(folder / "run" / "weights" / name, folder / name)
        replacements.append(kill_actor(it))

    tree = configuration(live_run, fleet, folder, "killed")
    run = play(tree, live_run, folder, "killed", kill_one)
    return run, replacements[0]


def configuration(live_run: LiveRun, fleet: Path, folder: Path, name: str) -> dict[str, Any]:
    tree: dict[str, Any] = copy.deepcopy(live_run.tree)
    tree["run"] = {"directory": str(folder / "run"), "steps": STEPS[name], "save_every": 0}
    sizes = {"prompts_per_step": PROMPTS[name], "prompts_per_mini_batch": PROMPTS[name] // 2}
    tree["algorithm"] |= {**sizes, "group_size": GROUP_SIZE, "topk": {"k": 0}}
    tree["rollout"] |= ON_RAY
    tree["evaluation"] = {}
    tree["serving"]["directory"] = str(fleet)
    tree["report"] = {"wandb": "disabled"}
    return tree


def play(
    tree: dict[str, Any],
    live_run: LiveRun,
    folder: Path,
    name: str,
    during: Callable[[Drill], None],
) -> RayRun:
    """A whole run; ``during`` is called while it runs."""
    config = write_config(folder / "sod.yaml", tree)
    record = ["--record", str(folder / "recordings")]
    command = torchrun(2, "pretrain_sod.py", str(config), *record)
    with drill(command, folder / "run", folder) as it:
        wait_for_rollout(it, 0)
        family = descendants(it.process.pid)
        ray_folder = folder_of_ray(family)
        assert ray_folder.is_dir()
        niceness = frozenset(psutil.Process(pid).nice() for pid, _ in actors(it))
        during(it)
        family |= descendants(it.process.pid)
        code = it.process.wait(timeout=600)
        left = wait_until_gone(family, GONE_SECONDS)
        assert not it.members()
        initial = Path(live_run.tree["student"]["model_path"])
        return RayRun(folder, initial, code, it.output(), frozenset(left), ray_folder, niceness)


def folder_of_ray(family: set[Process]) -> Path:
    """The folder that the run's Ray was given."""
    for pid, _ in family:
        words = psutil.Process(pid).cmdline()
        if "sod_mcore.rollout.on_ray.local_ray" in words:
            return Path(words[words.index("sod_mcore.rollout.on_ray.local_ray") + 2])
    raise AssertionError("the run has no Ray of its own")


def actors(it: Drill) -> set[Process]:
    """The processes of the rollout actors, which Ray names by their class."""
    return {
        (pid, start)
        for pid, start in descendants(it.process.pid)
        if psutil.pid_exists(pid) and "ray::RolloutActor" in " ".join(command_line(pid))
    }


def command_line(pid: int) -> list[str]:
    try:
        words: list[str] = psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return []
    return words


def kill_actor(it: Drill) -> Replacement:
    """Kill one actor; returns when another plays in its place."""
    before = actors(it)
    assert len(before) == ACTORS
    victim = min(before)
    time.sleep(PLAYED_SECONDS)
    started = time.monotonic()
    send(psutil.Process(victim[0]), signal.SIGKILL)
    it.wait_until(lambda: "plays again, on " in it.output(), REPLACED_SECONDS)
    assert len(actors(it) - {victim}) == ACTORS
    return Replacement(time.monotonic() - started)


@pytest.mark.parametrize("name", ["ahead", "killed"])
def test_everything_is_sampled_scored_and_trained(
    name: str, request: pytest.FixtureRequest, record_property: Record
) -> None:
    run = run_called(name, request)
    assert run.exit_code == 0, run.output[-6000:]
    assert [line["step"] for line in run.lines()] == list(range(1, STEPS[name] + 1))
    for line in run.lines():
        assert line["rollout/trajectories"] == PROMPTS[name] * GROUP_SIZE
        assert line["rollout/dropped"] == line["rollout/unscored"] == 0
        assert line["update/skipped"] == 0
        assert np.isfinite(line["update/loss"])
        assert line["weights/probe_difference"] < 1e-4
        record_property(f"seconds_of_step_{line['step']}", round(line["time/step"], 1))


@pytest.mark.parametrize("name", ["ahead", "killed"])
def test_the_requests_of_all_actors_are_counted(name: str, request: pytest.FixtureRequest) -> None:
    """In the line of the step in which they were sent, which may be the one before theirs."""
    lines = run_called(name, request).lines()
    total = STEPS[name] * PROMPTS[name] * GROUP_SIZE
    scored = sum(line["serving/teacher/requests"] for line in lines)
    # What a killed actor had finished of groups that were not complete is played and scored again.
    assert scored >= total if name == "killed" else scored == total
    assert sum(line["serving/student/requests"] for line in lines) > total


@pytest.mark.parametrize("name", ["ahead", "killed"])
def test_nothing_is_left(name: str, request: pytest.FixtureRequest) -> None:
    run = run_called(name, request)
    assert not run.left
    assert not run.ray_folder.exists()


@pytest.mark.parametrize("name", ["ahead", "killed"])
def test_every_token_is_of_the_weights_that_it_names(
    name: str, request: pytest.FixtureRequest
) -> None:
    run = run_called(name, request)
    for step in range(STEPS[name]):
        batch = run.batch(step)
        assert set(batch.staleness) == ({0, 1} if (name, step) == ("ahead", 1) else {0})
        for trajectory in batch.trajectories[:: PROMPTS[name] // 4]:
            of_version = trajectory.weight_version
            for version in {int(v) for v in of_version[trajectory.loss_mask]}:
                own = trajectory.loss_mask & (of_version == version)
                expected = input_logprobs(run.weights(version), trajectory)[own]
                found = trajectory.rollout_logprobs[own]
                np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["ahead", "killed"])
def test_the_scores_are_the_teachers(name: str, request: pytest.FixtureRequest) -> None:
    run = run_called(name, request)
    for step in range(STEPS[name]):
        for trajectory in run.batch(step).trajectories[:: PROMPTS[name] // 4]:
            expected, scored = input_logprobs(TEACHER, trajectory), trajectory.loss_mask
            found = trajectory.teacher_logprobs[scored]
            np.testing.assert_allclose(found, expected[scored], atol=1e-4)


def test_actors_and_their_programs_have_no_lower_priority_than_engines(ahead: RayRun) -> None:
    """Else a busy machine ends programs of the model that an idle one does not."""
    assert ahead.niceness == {0}


def test_programs_really_ran(ahead: RayRun) -> None:
    trajectories = [t for step in range(STEPS["ahead"]) for t in ahead.batch(step).trajectories]
    texts = [m["content"] for t in trajectories for m in t.messages if m["role"] == "tool"]
    assert sum(text.strip().lstrip("-").isdigit() for text in texts) > len(trajectories) / 4


def test_the_groups_of_a_killed_actor_are_played_again(
    killed: tuple[RayRun, Replacement], record_property: Record
) -> None:
    """All of each, and each once."""
    run, replacement = killed
    record_property("seconds_until_another_actor", round(replacement.seconds, 1))
    retries = [int(line["rollout/retries"]) for line in run.lines()]
    record_property("conversations_played_again", retries[KILLED_IN])
    again = retries.pop(KILLED_IN)
    assert 0 < again <= PROMPTS["killed"] // ACTORS * GROUP_SIZE
    assert again % GROUP_SIZE == 0
    assert set(retries) == {0}
    for step in range(STEPS["killed"]):
        counted = Counter(t.group_id for t in run.batch(step).trajectories)
        assert list(counted.values()) == [GROUP_SIZE] * PROMPTS["killed"]
    died, back = [line for line in run.output.splitlines() if line.startswith("rollout actor ")]
    assert " died: " in died
    assert back.startswith(f"{died.partition(' on ')[0]} plays again, on ")


def run_called(name: str, request: pytest.FixtureRequest) -> RayRun:
    """The run of one of the fixtures."""
    found = request.getfixturevalue(name)
    return found[0] if isinstance(found, tuple) else found
