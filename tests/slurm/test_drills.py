"""Jobs on a real SLURM: warned in each phase, requeued, continued; over one node and over several.

The nodes are three virtual ones of this machine (``cluster.py``). Engines, tools, trainer and
SLURM are real; GPUs, networks and other machines are not there.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.outcome import Outcome, read_outcome
from sod_mcore.trajectory import recorded_batch_path
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import STEPS, JobRun, arithmetic, submit

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

Record = Callable[[str, object], None]
TWO_RANKS = ("--template=one_node", "--ranks-per-node=2")
WHOLE_ROLLOUT = r"^rollout and scoring: (\d+)/\1 "
WHOLE_UPDATES = r"^updates: (\d+)/\1 "


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def settings(folder: Path) -> dict[str, Any]:
    return arithmetic(folder)


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, folder: Path, settings: dict[str, Any]) -> JobRun:
    """Two nodes with one rank each, a third one with the engines, no signal."""
    options = ("--template=engine_nodes", "--nodes=3", "--engine-nodes=1", "--ranks-per-node=1")
    run = submit(cluster, folder, "undisturbed", settings, *options)
    assert run.wait_for_end().state == "COMPLETED", run.everything()
    return run


def test_ranks_on_two_nodes_and_engines_on_a_third(undisturbed: JobRun) -> None:
    assert undisturbed.steps() == list(range(STEPS + 1))
    assert read_outcome(undisturbed.directory) == Outcome("finished", STEPS, "all steps are done")
    ranks = undisturbed.log(0, "trainer-0.log") + undisturbed.log(0, "trainer-1.log")
    assert f"finished {STEPS} steps" in ranks
    assert "http://n2:" in undisturbed.log(0, "engines-0.log")
    assert "[serving] stopping" in undisturbed.log(0, "engines-0.log"), "ended in order"


def test_warnings_in_every_phase_change_nothing(
    undisturbed: JobRun,
    cluster: SlurmCluster,
    folder: Path,
    settings: dict[str, Any],
    record_property: Record,
) -> None:
    """Rollout, scoring, updates: three warnings, three requeues, and the run of no warning."""
    started = time.monotonic()
    run = submit(cluster, folder, "warned", settings, *TWO_RANKS)

    run.wait_for_line(0, r"^step 1/")  # the next rollout begins
    run.warn()
    run.wait_for_restart(1)
    assert (_count(run, 0, WHOLE_ROLLOUT), _count(run, 0, WHOLE_UPDATES)) == (1, 1)
    assert "stopped after 1 of 3 steps" in run.log(0), run.everything()

    run.wait_for_line(1, r"^rollout and scoring: ")  # one has ended and is scored, others have not
    run.warn()
    run.wait_for_restart(2)
    assert (_count(run, 1, WHOLE_ROLLOUT), _count(run, 1, WHOLE_UPDATES)) == (0, 0)
    assert "stopped after 1 of 3 steps" in run.log(1), run.everything()

    run.wait_for_line(2, r"^updates: 1/")
    assert _count(run, 2, WHOLE_UPDATES) == 0, "too late for a warning during the updates"
    run.warn()
    run.wait_for_restart(3)
    assert _count(run, 2, WHOLE_UPDATES) == 1
    assert "stopped after 2 of 3 steps" in run.log(2), run.everything()

    job = run.wait_for_end()
    assert (job.state, job.restarts) == ("COMPLETED", 3), run.everything()
    assert read_outcome(run.directory) == Outcome("finished", STEPS, "all steps are done")
    assert run.steps() == undisturbed.steps()
    assert run.prompt_order() == undisturbed.prompt_order()
    assert len(run.prompt_order()[0]) == 16
    ids = run.wandb_run_ids()
    assert len(ids) == 4
    assert set(ids) == {(run.directory / "wandb_run_id").read_text().strip()}
    assert run.output().count("SLURM warns") == 3
    record_property("seconds", round(time.monotonic() - started))


def test_each_node_with_ranks_and_engines(
    cluster: SlurmCluster, folder: Path, settings: dict[str, Any]
) -> None:
    """Two nodes, each with a rank and an engine of the student; nothing is distilled."""
    serving = {name: value for name, value in settings["serving"].items() if name != "teacher"}
    algorithm = {**settings["algorithm"], "distillation": "none", "topk": {"k": 0}}
    tree = {**settings, "serving": serving, "algorithm": algorithm}
    options = ("--template=shared_nodes", "--nodes=2", "--ranks-per-node=1")
    run = submit(cluster, folder, "shared", tree, *options)
    assert run.wait_for_end().state == "COMPLETED", run.everything()
    assert run.steps() == list(range(STEPS + 1))
    addresses = run.directory / "slurm" / f"{run.number}.0" / "addresses"
    engines = json.loads(addresses.read_text().strip().partition("=")[2])
    assert sorted(url.split(":")[1] for url in engines) == ["//n0", "//n1"]


def test_requeues_are_bounded(
    undisturbed: JobRun, cluster: SlurmCluster, folder: Path, settings: dict[str, Any]
) -> None:
    """With one restart allowed, the second warning ends the job with a code of its own."""
    tree = {key: value for key, value in settings.items() if key != "serving"}
    recorded = recorded_batch_path(undisturbed.folder / "undisturbed_recordings", 0)
    tree["run"] = {**settings["run"], "replay": str(recorded), "steps": 1000}
    run = submit(cluster, folder, "bounded", tree, *TWO_RANKS, "--max-restarts=1")
    for attempt in range(2):
        run.wait_for_restart(attempt)
        run.wait_for_line(attempt, r"^step \d+/1000: .*loss")
        run.warn()
    job = run.wait_for_end()
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 75, 1), run.everything()
    outcome = read_outcome(run.directory)
    assert outcome is not None
    assert outcome.outcome == "stopped"
    assert run.steps() == list(range(outcome.completed_steps + 1))
    assert "restarted 1 times (MAX_RESTARTS)" in run.output()


def _count(run: JobRun, attempt: int, pattern: str) -> int:
    return len(re.findall(pattern, run.log(attempt), re.MULTILINE))
