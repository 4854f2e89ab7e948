"""Waiting for processes of the fleet that are being started again."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from sod_mcore.serving.endpoints import FleetError
from sod_mcore.serving.fleet.state import Condition, FleetStateFile, wait_for_restarts

ENGINE = ("student_engine_0", "student", "engine", "http://127.0.0.1:1")


def record(directory: Path, state: Condition, restarts: int) -> FleetStateFile:
    file = FleetStateFile(directory)
    name, model, _, url = ENGINE
    file.record(name, model, "engine", url, state, restarts)
    return file


def test_an_engine_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    record(tmp_path, "restarting", 0)
    back_at = time.monotonic() + 1.0
    timer = threading.Timer(1.0, lambda: record(tmp_path, "ready", 1))
    timer.start()
    wait_for_restarts(tmp_path, 60.0)
    assert time.monotonic() >= back_at
    timer.join()


def test_one_that_does_not_is_one_clear_error(tmp_path: Path) -> None:
    record(tmp_path, "restarting", 0)
    with pytest.raises(FleetError, match=r"student_engine_0: died.* within 0\.1 s;"):
        wait_for_restarts(tmp_path, 0.1)


def test_nothing_is_waited_for_where_nothing_died(tmp_path: Path) -> None:
    started = time.monotonic()
    wait_for_restarts(tmp_path, 60.0)  # the engines are those of others
    record(tmp_path, "ready", 2)
    wait_for_restarts(tmp_path, 60.0)
    assert time.monotonic() - started < 30.0
