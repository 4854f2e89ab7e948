"""Real engines, started once for all tests of this folder that need them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from sod_mcore.serving.endpoints import Endpoints, endpoints_path, read_endpoints
from tests.serving.processes import descendants, running
from tests.serving.tiny_models import save_model

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 500.0


@dataclass(frozen=True)
class LiveFleet:
    """A served student (two engines, untied) and teacher (tied), and their weights' folders.

    Attributes:
        directory: ``run.directory``.
    """

    directory: Path
    endpoints: Endpoints
    student: Path
    teacher: Path
    other_student: Path


def sglang_python() -> str:
    """Interpreter of the environment with SGLang; SOD_SGLANG_PYTHON overrides the usual place."""
    return os.environ.get("SOD_SGLANG_PYTHON", str(REPOSITORY / ".venv-sglang/bin/python"))


@pytest.fixture(scope="module")
def live_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFleet]:
    folder = tmp_path_factory.mktemp("fleet")
    names = ("student", "teacher", "other_student")
    student, teacher, other = (
        save_model(folder / name, seed, tied=name == "teacher") for seed, name in enumerate(names)
    )
    config = {
        "run": {"directory": str(folder / "run")},
        "student": {"model_path": str(student)},
        "data": {"train": "unused.parquet"},
        "serving": {
            "python": sglang_python(),
            "device": "cpu",
            "student": {"model_path": str(student), "engines": 2},
            "teacher": {"model_path": str(teacher)},
            "start_timeout_seconds": START_SECONDS,
        },
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    log = (folder / "serving.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "sod_mcore.serving", str(file)],
        cwd=REPOSITORY,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        _wait_until_served(process, folder / "run", folder / "serving.log")
        endpoints = read_endpoints(folder / "run")
        yield LiveFleet(folder / "run", endpoints, student, teacher, other)
        family = descendants(process.pid)
        assert len(family) > 9, "three engines of three processes each, and two routers"
    finally:
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(timeout=60)
    assert exit_code == 0
    assert not running(family), "the stop left processes behind"
    assert not endpoints_path(folder / "run").exists()
    urls = [endpoints.front_door]
    for model in endpoints.models.values():
        urls += [model.route, *model.engines]
    assert not [url for url in urls if _is_open(url)], "the stop left ports open"


def _wait_until_served(process: subprocess.Popen[bytes], directory: Path, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not endpoints_path(directory).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the fleet did not start:\n{log.read_text()}")
        time.sleep(0.2)


def _is_open(url: str) -> bool:
    address = urlsplit(url)
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((address.hostname or "", address.port or 0)) == 0
