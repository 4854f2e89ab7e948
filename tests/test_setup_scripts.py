"""The set-up scripts on machines that lack something: one line with the mend, nothing touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def run_script(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def in_library(script: str, *arguments: str, **environment: str) -> str:
    """Standard output of shell lines that run after ``scripts/setup_lib.sh``."""
    command = ["bash", "-c", f"source scripts/setup_lib.sh\n{script}", "bash", *arguments]
    result = run_script(command, PYTHON=sys.executable, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"CXX": "no-such-compiler"},
            "no C++ compiler (no-such-compiler): apt-get install -y build-essential",
        ),
        ({"PYTHON": "/nowhere/python3"}, "Python 3.11 or newer is needed: set PYTHON="),
    ],
)
def test_what_is_missing_is_one_line_with_the_mend(
    environment: dict[str, str], message: str
) -> None:
    result = run_script(["scripts/setup_trainer.sh"], **{"PYTHON": sys.executable, **environment})
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("setup: error: ")
    assert message in result.stderr


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.9" || exit 1\n')
    old.chmod(0o755)
    result = run_script(["scripts/setup_sglang.sh"], PYTHON=str(old))
    assert result.returncode == 2
    assert f"{old} is Python 3.10.9; Python 3.11 or newer is needed" in result.stderr


def test_an_environment_is_current_until_an_input_changes(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    script = 'f=$(fingerprint "$1"); is_current "$2" part "$f" && echo current || echo stale'
    mark = 'mark_current "$2" part "$(fingerprint "$1")"'
    requirements.write_text("torch==1\n")
    arguments = (str(requirements), str(environment))
    assert in_library(script, *arguments) == "stale"
    in_library(mark, *arguments)
    assert in_library(script, *arguments) == "current"
    requirements.write_text("torch==2\n")
    assert in_library(script, *arguments) == "stale"
    in_library(mark, *arguments)
    (environment / "bin" / "python").unlink()
    assert in_library(script, *arguments) == "stale"


@pytest.mark.parametrize("index", ["", "https://index.example/simple"])
def test_the_index_applies_to_torch_alone(tmp_path: Path, index: str) -> None:
    """A recording interpreter stands in for the environment's."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    calls = in_library(
        'install_torch "$1"; pip_install "$1" --requirement requirements/trainer.txt',
        str(tmp_path),
        TORCH_INDEX=index,
    ).splitlines()
    torch_line, other_line = calls
    assert torch_line.endswith("--requirement requirements/torch.txt")
    assert ("--index-url https://index.example/simple" in torch_line) == bool(index)
    assert "--index-url" not in other_line
    assert "--constraint requirements/constraints.txt" in other_line


def test_apex_is_no_requirement() -> None:
    """PyPI's package of that name has nothing to do with NVIDIA's."""
    files = [*REPOSITORY.glob("requirements/*.txt"), REPOSITORY / "pyproject.toml"]
    assert len(files) > 5
    for path in files:
        assert "apex" not in path.read_text().lower(), path
