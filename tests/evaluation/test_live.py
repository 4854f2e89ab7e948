"""A real model measured by the command, killed in the middle and continued."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.evaluation.__main__ import main
from tests.end_to_end.programs import REPOSITORY, environment, run, write_config
from tests.evaluation.teacher_settings import PROBLEMS, command, samples, settings
from tests.serving.processes import descendants, wait_until_gone

SAMPLES = 2
DEADLINE_SECONDS = 240.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of an evaluation whose chunks are single problems."""
    folder = tmp_path_factory.mktemp("evaluation")
    tree = settings(folder)
    tree["evaluation"] |= {"samples": SAMPLES, "chunk_trajectories": SAMPLES}
    tree["report"] = {"wandb": "offline"}
    return write_config(folder / "evaluation.yaml", tree)


@pytest.fixture(scope="module")
def killed(config: Path) -> list[dict[str, Any]]:
    """The samples that an evaluation left which was killed after its first ones."""
    log = (config.parent / "killed.log").open("wb")
    process = subprocess.Popen(
        command(config), cwd=REPOSITORY, env=environment(), stdout=log, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not samples(config):
        assert process.poll() is None, (config.parent / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not wait_until_gone(family, seconds=30), "the kill left processes behind"
    return samples(config)


@pytest.fixture(scope="module")
def finished(config: Path, killed: list[dict[str, Any]]) -> str:
    """What the same command printed when it was given again."""
    return run(command(config), timeout_seconds=2 * DEADLINE_SECONDS).stdout


def test_the_kill_came_in_the_middle(killed: list[dict[str, Any]]) -> None:
    assert 0 < len(killed) < PROBLEMS * SAMPLES


def test_every_sample_is_there_once(
    config: Path, killed: list[dict[str, Any]], finished: str
) -> None:
    assert f"{PROBLEMS * SAMPLES - len(killed)} samples to draw" in finished
    everything = samples(config)
    assert everything[: len(killed)] == killed
    keys = sorted((sample["prompt_id"], sample["index"]) for sample in everything)
    assert keys == sorted((f"eval/{p}", i) for p in range(PROBLEMS) for i in range(SAMPLES))


def test_results_are_those_of_the_samples(config: Path, finished: str) -> None:
    everything = samples(config)
    (line,) = (config.parent / "output" / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    share = sum(sample["is_correct"] for sample in everything) / len(everything)
    assert result["average"]["value"] == pytest.approx(share)
    assert share > 0.9, "the committed teacher solves nearly all of these"
    assert result["dropped"] == 0
    assert result["tool_calls"] >= 1
    assert f"{100 * share:.1f}%" in finished
    assert (config.parent / "output" / "results.md").read_text() in finished


def test_samples_tell_what_the_model_did(config: Path, finished: str) -> None:
    for sample in samples(config):
        roles = [message["role"] for message in sample["messages"]]
        assert roles[:3] == ["user", "assistant", "tool"]
        assert roles.count("assistant") == sample["turns"]
        assert sample["category"] == ("right" if sample["is_correct"] else sample["category"])
        assert sample["prediction"] or not sample["is_correct"]


def test_weights_and_biases_files_are_there(config: Path, finished: str) -> None:
    assert list((config.parent / "output" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_complete_evaluation_starts_no_engine(
    config: Path, finished: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config), "report.wandb=disabled"]) == 0
    again = capsys.readouterr().out
    assert "to draw" not in again
    assert "starting" not in again
    assert (config.parent / "output" / "results.md").read_text() in again


def test_other_settings_are_refused(
    config: Path, finished: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(config), "evaluation.top_p=0.5"])
    problem = capsys.readouterr().err
    assert problem.startswith("error: evaluation.top_p is 0.5, but the samples in ")
    assert problem.count("\n") == 1
