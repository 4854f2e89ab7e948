"""``sod slurm``: what it writes, read back by bash, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.config import ConfigError
from sod_mcore.slurm.command_line import main
from sod_mcore.slurm.request import TEMPLATES, time_limit_seconds
from sod_mcore.slurm.template import REPOSITORY
from tests.slurm.small_config import write_small_config

ONE_NODE = ("--template", "one_node", "--gpus-per-node", "8")
SHARED = ("--template", "shared_nodes", "--nodes", "3", "--gpus-per-node", "8")
APART = (
    *("--template", "engine_nodes", "--nodes", "4", "--engine-nodes", "1"),
    *("--gpus-per-node", "8"),
)
WHERE = ("--partition", "gpu", "--time", "12:00:00")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_job(folder: Path, *options: str, **sections: Any) -> str:
    """The job file that ``sod slurm`` writes for the small configuration."""
    write_small_config(folder, **sections)
    assert main(["config.yaml", *options, *WHERE, "--output", "job.sbatch"]) == 0
    check = subprocess.run(["bash", "-n", "job.sbatch"], capture_output=True, timeout=30)
    assert check.returncode == 0, check.stderr
    text = (folder / "job.sbatch").read_text()
    settings = [line for line in text.splitlines() if not line.startswith("# ")]
    assert not re.search(r"@[A-Z_]+@", "\n".join(settings))
    return text


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *options: str, **changes: Any) -> str:
    """The one line with which ``sod slurm`` refuses; nothing is written."""
    write_small_config(folder, **changes)
    with pytest.raises(SystemExit) as exit_info:
        main(["config.yaml", *WHERE, *options, "--output", "job.sbatch"])
    assert exit_info.value.code == 2
    assert not (folder / "job.sbatch").exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def variable(job: str, name: str) -> str:
    """What bash makes of ``NAME=...`` in a job file; elements of an array one a line."""
    line = next(line for line in job.splitlines() if line.startswith(f"{name}="))
    command = ["bash", "-c", f'{line}\nprintf "%s\\n" "${{{name}[@]}}"']
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.removesuffix("\n")


def sbatch_options(job: str) -> dict[str, str]:
    """The options of the ``#SBATCH`` lines."""
    words = [w for line in job.splitlines() if line.startswith("#SBATCH") for w in line.split()[1:]]
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


@pytest.mark.parametrize("options", [ONE_NODE, SHARED, APART], ids=TEMPLATES)
def test_what_sbatch_is_told(folder: Path, options: tuple[str, ...]) -> None:
    told = sbatch_options(write_job(folder, *options, "--account", "a-1"))
    nodes = options[options.index("--nodes") + 1] if "--nodes" in options else "1"
    assert told["nodes"] == nodes
    assert told["ntasks-per-node"] == "1"
    assert told["gpus-per-node"] == "8"
    assert (told["partition"], told["account"], told["time"]) == ("gpu", "a-1", "12:00:00")
    assert told["job-name"] == "mine"
    assert told["signal"] == "B:USR1@600"
    assert told["chdir"] == str(folder)
    assert {"requeue", "exclusive"} <= told.keys()
    assert told["open-mode"] == "append"


def test_what_is_not_asked_for_is_left_out(folder: Path) -> None:
    no_gpus: dict[str, list[int]] = {"gpus": []}
    job = write_job(
        folder,
        *("--template", "one_node", "--gpus-per-node", "0", "--ranks-per-node", "2"),
        serving={"student": no_gpus, "teacher": no_gpus},
    )
    assert not {"account", "gpus-per-node"} & sbatch_options(job).keys()
    assert variable(job, "RANKS_PER_NODE") == "2"
    assert variable(job, "INTERFACE") == ""


def test_settings_survive_the_shell(folder: Path) -> None:
    awkward = ["report.name=it's $HOME", "evaluation.temperatures=[1.0, 0.0]"]
    job = write_job(folder, *ONE_NODE, *awkward)
    assert variable(job, "SETTINGS").split("\n") == ["config.yaml", *awkward]
    assert variable(job, "RUN_DIRECTORY") == "runs/mine"
    assert variable(job, "STOP_FILE") == "runs/mine/stop"
    assert variable(job, "PYTHON") == sys.executable
    assert Path(variable(job, "REPOSITORY")) == REPOSITORY


def test_overrides_count_as_settings(folder: Path) -> None:
    job = write_job(folder, "run.stop_file=halt", *ONE_NODE, "run.directory=runs/other one")
    assert variable(job, "RUN_DIRECTORY") == "runs/other one"
    assert variable(job, "STOP_FILE") == "halt"
    assert sbatch_options(job)["job-name"] == "other_one"


@pytest.mark.parametrize(
    ("options", "megatron", "ranks_per_node"),
    [
        (ONE_NODE, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3}, "6"),
        (SHARED, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 9}, "6"),
        (APART, {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 3}, "8"),
        ((*SHARED, "--ranks-per-node", "4"), {"context_parallel_size": 12}, "4"),
    ],
)
def test_ranks_take_what_the_engines_leave(
    folder: Path, options: tuple[str, ...], megatron: dict[str, int], ranks_per_node: str
) -> None:
    job = write_job(folder, *options, student={"megatron": megatron})
    assert variable(job, "RANKS_PER_NODE") == ranks_per_node


def test_a_replay_starts_no_engines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(folder, *SHARED, run={"replay": "train.parquet"})
    assert variable(job, "WITH_ENGINES") == "no"
    assert variable(job, "RANKS_PER_NODE") == "8"
    assert "24 ranks on 3 node(s): 24 replica(s) of 1\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (
            ONE_NODE,
            {"student": {"megatron": {"tensor_model_parallel_size": 4}}},
            "makes 4 ranks a replica, which does not divide the 6 ranks",
        ),
        (
            ONE_NODE,
            {"student": {"megatron": {"tensor_model_parallel_size": "two"}}},
            "student.megatron.tensor_model_parallel_size is 'two'",
        ),
        (
            (*ONE_NODE, "--ranks-per-node", "7"),
            {},
            "7 ranks and 2 GPUs of engines need 9 on each node",
        ),
        (
            ONE_NODE,
            {"serving": {"student": {"gpus": [0]}}},
            "serving takes GPU 0, but the node's 6 ranks take GPUs 0 to 5",
        ),
        (ONE_NODE, {"serving": {"engines_on": "ray"}}, "serving.engines_on is ray, but a SLURM"),
        (ONE_NODE, {"serving": {"teacher": {"gpus": [8]}}}, "serving.teacher.gpus is [8]"),
        (ONE_NODE, {"serving": {"teacher": {"gpus": [6]}}}, "take GPU 6 as well"),
        (ONE_NODE, {"serving": {"teacher": {"gpus": []}}}, "serving.teacher.gpus is empty"),
        (
            ONE_NODE,
            {"serving": {"student": {"gpus": [5, 6], "engines": 3}}},
            "3 engines cannot share evenly",
        ),
        (
            SHARED,
            {"serving": {"student": {"addresses": ["http://x:1"]}}},
            "serving.student.addresses",
        ),
        (ONE_NODE, {"serving": {"placement": "colocated"}}, "serving.placement is colocated"),
        (ONE_NODE, {"serving": {"weight_sync": "cuda_ipc"}}, "serving.weight_sync is cuda_ipc"),
        (APART, {"run": {"replay": "train.parquet"}}, "run.replay is train.parquet"),
        ((*ONE_NODE, "--nodes", "2"), {}, "--nodes is 2 with --template one_node"),
        ((*SHARED, "--engine-nodes", "1"), {}, "--engine-nodes is 1, which only"),
        ((*APART, "--engine-nodes", "4"), {}, "fewer than all"),
        ((*ONE_NODE, "--gpus-per-node", "0"), {}, "serving.student.gpus is [6]"),
        ((*ONE_NODE, "--time", "noon"), {}, "--time is 'noon'"),
        ((*ONE_NODE, "--time", "10"), {}, "--time is 10, not more than the 600 s"),
        ((*ONE_NODE, "--partition", "a b"), {}, "--partition is 'a b'"),
        ((*ONE_NODE, "--max-restarts", "-1"), {}, "--max-restarts is -1; at least 0"),
        ((*ONE_NODE, "run.steps=0"), {}, "run.steps is 0"),
        (ONE_NODE, {"data": {"train": "nothing.parquet"}}, "data.train: nothing.parquet does not"),
        (ONE_NODE, {"serving": {"teacher": {"model_path": "x"}}}, "serving.teacher.model_path: x"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert message in refusal(folder, capsys, *options, **changes)


def test_without_gpus_the_ranks_must_be_given(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_gpus: dict[str, dict[str, list[int]]] = {"student": {"gpus": []}, "teacher": {"gpus": []}}
    options = ("--template", "one_node", "--gpus-per-node", "0")
    assert "--ranks-per-node is missing" in refusal(folder, capsys, *options, serving=no_gpus)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("2:30", 150),
        ("12:00:00", 43200),
        ("1-0", 86400),
        ("1-2:03", 93780),
        ("1-02:03:04", 93784),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert time_limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1:2:3:4", "-5", "1h", "UNLIMITED"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--time"):
        time_limit_seconds(text)


def test_the_scripts_pass_shellcheck() -> None:
    scripts = sorted((REPOSITORY / "scripts" / "slurm").iterdir())
    scripts += sorted((REPOSITORY / "tests" / "slurm" / "fake_slurm").iterdir())
    assert len(scripts) == 9
    shellcheck = Path(sys.executable).with_name("shellcheck")
    command = [str(shellcheck), "--external-sources", *map(str, scripts)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
