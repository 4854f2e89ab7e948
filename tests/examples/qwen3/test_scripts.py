"""The shell scripts of the Qwen3 recipes: which command a set of variables becomes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.programs import REPOSITORY

FOLDER = REPOSITORY / "examples" / "qwen3"
PATHS = {
    "MODEL_PATH": "models/cold",
    "TEACHER_MODEL_PATH": "models/4b",
    "TRAIN_DATA": "data/a.parquet",
    "SAVE_PATH": "runs/here",
}
Run = Callable[..., tuple[list[str], str]]
"""``run(script, *arguments, **variables)``: the command that it starts, and its standard error."""
STUB = """#!{python}
import json, pathlib, sys
out = pathlib.Path({out!r})
out.write_text(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]))
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a script with stand-ins for python and torchrun; returns what it would have started."""
    out = tmp_path / "command.json"
    for program in ("python", "torchrun"):
        stub = tmp_path / program
        stub.write_text(STUB.format(python=sys.executable, out=str(out)))
        stub.chmod(stub.stat().st_mode | stat.S_IEXEC)

    def start(script: str, *arguments: str, **variables: str) -> tuple[list[str], str]:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
        done = subprocess.run(
            [FOLDER / script, *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode == 0) == out.exists(), done.stderr
        assert done.returncode in (0, 2)
        return (json.loads(out.read_text()) if out.exists() else []), done.stderr

    return start


def test_fine_tuning(run: Run) -> None:
    command, _ = run("run_sft.sh", "sft.updates=3", RANKS="2", SIZE="1.7b", **PATHS)
    assert command == [
        *("torchrun", "--nproc-per-node", "2", "scripts/train_sft.py"),
        "examples/qwen3/1.7b/sft.yaml",
        "student.model_path=models/cold",
        "data.train=data/a.parquet",
        "sft.directory=runs/here",
        "sft.export=runs/here/student",
        "sft.updates=3",
    ]


@pytest.mark.parametrize(
    ("method", "teacher"),
    [
        ("sod", ["serving.teacher.model_path=models/4b"]),
        ("opd", ["serving.teacher.model_path=models/4b"]),
        ("opsd_gt", ["serving.teacher.model_path=models/cold"]),
        ("grpo", []),
    ],
)
def test_distillation(run: Run, method: str, teacher: list[str]) -> None:
    command, _ = run("run_sod.sh", "run.steps=3", METHOD=method, **PATHS)
    config = f"examples/qwen3/0.6b/{method}.yaml"
    settings = [
        *("student.model_path=models/cold", "serving.student.model_path=models/cold", *teacher),
        *("data.train=data/a.parquet", "run.directory=runs/here", "run.export=runs/here/student"),
        "run.steps=3",
    ]
    serve = ["python", "-m", "sod_mcore.serving", config, *settings, "--"]
    train = ["torchrun", "--nproc-per-node", "4", "pretrain_sod.py", config, *settings]
    assert command == [*serve, *train]


@pytest.mark.parametrize(
    ("script", "name", "data"),
    [
        ("run_eval_aime.sh", "aime", "data/aime2024.parquet, data/aime2025.parquet"),
        ("run_eval_gpqa.sh", "gpqa", "data/gpqa_diamond.parquet"),
        ("run_eval_livecodebench.sh", "livecodebench", "data/lcb_v6.parquet"),
    ],
)
def test_evaluation(run: Run, script: str, name: str, data: str) -> None:
    command, _ = run(script, "evaluation.samples=4", **PATHS)
    assert command == [
        *("python", "-m", "sod_mcore.evaluation", "examples/qwen3/0.6b/vanilla.yaml"),
        "serving.student.model_path=models/cold",
        f"evaluation.data=[{data}]",
        f"evaluation.output=runs/here/{name}",
        "evaluation.samples=4",
    ]


@pytest.mark.parametrize("missing", ["MODEL_PATH", "TRAIN_DATA", "SAVE_PATH", "TEACHER_MODEL_PATH"])
def test_a_missing_variable_is_named(run: Run, missing: str) -> None:
    paths = {key: value for key, value in PATHS.items() if key != missing}
    command, problem = run("run_sod.sh", **paths)
    assert not command
    assert problem.startswith(f"error: {missing} is not set; it must be ")


def test_the_teacher(run: Run) -> None:
    command, _ = run("run_sod.sh", METHOD="teacher_grpo", SIZE="4b", **PATHS)
    assert command[3] == "examples/qwen3/4b/teacher_grpo.yaml"
    assert not any("serving.teacher" in argument for argument in command)


@pytest.mark.parametrize("method", ["sft", "vanilla"])
def test_a_row_without_rollouts_in_training(run: Run, method: str) -> None:
    command, problem = run("run_sod.sh", METHOD=method, **PATHS)
    assert not command
    assert problem.startswith(f"error: METHOD is {method}, which has no rollouts")


@pytest.mark.parametrize(("variable", "value"), [("METHOD", "ppo"), ("SIZE", "7b")])
def test_a_recipe_that_does_not_exist(run: Run, variable: str, value: str) -> None:
    command, problem = run("run_sod.sh", **PATHS, **{variable: value})
    assert not command
    assert problem.startswith("error: there is no recipe examples/qwen3/")


def test_the_scripts_pass_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = sorted(str(path) for path in FOLDER.glob("run_*.sh"))
    command = [str(shellcheck), "--external-sources", "--source-path=SCRIPTDIR", *scripts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
