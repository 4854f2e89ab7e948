"""Fleets of several nodes, joined to one: real processes in place of SGLang's."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from sod_mcore.serving.endpoints import Endpoints, FleetError, ModelEndpoints, endpoints_path
from sod_mcore.serving.fleet.joining import address_settings, wait_for_fleets
from tests.serving.fleet.test_lifecycle import REPOSITORY, SECONDS, Setup, setup

__all__ = ["setup"]


def wait_for_engines(*folders: Path, timeout: float = SECONDS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sod_mcore.cli", "wait-for-engines"]
    return subprocess.run(
        [*command, "--timeout", str(timeout), *map(str, folders)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        check=False,
    )


def test_two_nodes_become_one_fleet(setup: Setup) -> None:
    """As scripts/slurm/nodes.sh does it; each "node" has an address of its own."""
    folders = [setup.folder / "node_0", setup.folder / "node_1"]
    with ExitStack() as stack:
        for number, folder in enumerate(folders, start=1):
            here = (f"serving.directory={folder}", f"serving.host=127.0.0.{number}")
            stack.enter_context(setup.serve(overrides=here))
        waited = wait_for_engines(*folders)
        assert waited.returncode == 0, waited.stderr
        settings = tuple(waited.stdout.splitlines())
        copy = setup.folder / "copy.json"
        joint = setup.folder / "joint"
        command = ("cp", str(endpoints_path(joint)), str(copy))
        with setup.serve(*command, overrides=(*settings, f"serving.directory={joint}")) as serving:
            assert serving.wait() == 0, serving.text()
    models = json.loads(copy.read_text())["models"]
    hosts = [url.split(":")[1] for url in models["student"]["engines"]]
    assert hosts == ["//127.0.0.1", "//127.0.0.1", "//127.0.0.2", "//127.0.0.2"]
    assert len(models["teacher"]["engines"]) == 2
    assert models["student"]["route"] not in models["student"]["engines"]


def test_a_node_that_does_not_come(tmp_path: Path) -> None:
    waited = wait_for_engines(tmp_path / "node_0", timeout=0.1)
    assert waited.returncode == 1
    assert waited.stderr.startswith("error: 1 of 1 fleets are not ready after 0.1 s")
    assert str(tmp_path / "node_0") in waited.stderr
    assert not waited.stdout


def test_settings_name_every_engine() -> None:
    settings = address_settings([fleet("a", "student"), fleet("b", "student")])
    assert len(settings) == 1
    key, _, value = settings[0].partition("=")
    assert key == "serving.student.addresses"
    assert yaml.safe_load(value) == ["http://a:1", "http://b:1"]


def test_nodes_with_different_models_are_refused() -> None:
    with pytest.raises(FleetError, match="different models"):
        address_settings([fleet("a", "student"), fleet("b", "student", "teacher")])


def test_unreadable_addresses(tmp_path: Path) -> None:
    endpoints_path(tmp_path).parent.mkdir(parents=True)
    endpoints_path(tmp_path).write_text("{")
    with pytest.raises(FleetError, match="not JSON"):
        wait_for_fleets([tmp_path], 1.0)


def fleet(host: str, *names: str) -> Endpoints:
    models = {
        name: ModelEndpoints(name, f"http://{host}:9", (f"http://{host}:1",), "folder", 99, 50)
        for name in names
    }
    return Endpoints(f"http://{host}:8", models, 1, 1, host)
