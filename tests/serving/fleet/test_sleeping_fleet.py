"""What a fleet does whose engines a trainer has put to sleep, with fakes in the place of SGLang: it
starts none while the trainer works, and leaves none asleep when the trainer has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from sod_mcore.serving.fleet.sleep_file import sleep_path, write_sleep
from tests.serving.fleet.test_lifecycle import Setup, setup
from tests.serving.fleet.test_restarts import state_of, wait_for_state
from tests.serving.processes import leader_at

__all__ = ["setup"]

LONGER_THAN_A_RESTART = 5.0
"""Seconds: the pause is one, and a fake engine starts in half of one."""


@pytest.fixture
def colocated(setup: Setup) -> Setup:
    setup.settings["serving"]["placement"] = "colocated"
    for name in ("student", "teacher"):
        setup.settings["serving"][name]["max_total_tokens"] = 1000
    return setup


def test_an_engine_that_dies_while_the_trainer_works(colocated: Setup) -> None:
    """Its memory is the trainer's; it starts when that is given back."""
    with colocated.serve() as serving:
        endpoints = serving.wait_until_served()
        (teacher,) = endpoints.model("teacher").engines
        asleep = {url: 1 for model in endpoints.models.values() for url in model.engines}
        write_sleep(serving.directory, asleep, is_training=True)
        os.kill(leader_at(serving.process.pid, teacher), signal.SIGKILL)
        wait_for_state(serving, "teacher_engine_0", "restarting", 0)
        time.sleep(LONGER_THAN_A_RESTART)
        assert state_of(serving, "teacher_engine_0").restarts == 0
        write_sleep(serving.directory, asleep, is_training=False)
        wait_for_state(serving, "teacher_engine_0", "ready", 1)
        for name in ("student_engine_0", "student_engine_1"):
            assert state_of(serving, name).restarts == 0, "they sleep, and their trainer lives"
    assert not sleep_path(serving.directory).exists()


def test_a_router_needs_no_memory(colocated: Setup) -> None:
    with colocated.serve() as serving:
        route = serving.wait_until_served().model("student").route
        write_sleep(serving.directory, {}, is_training=True)
        os.kill(leader_at(serving.process.pid, route), signal.SIGKILL)
        wait_for_state(serving, "student_router", "ready", 1)


def test_what_a_dead_trainer_has_left_asleep_is_started_again(colocated: Setup) -> None:
    with colocated.serve() as serving:
        endpoints = serving.wait_until_served()
        first, second = endpoints.model("student").engines
        program = (
            "import sys; from pathlib import Path; "
            "from sod_mcore.serving.fleet.sleep_file import *; "
            "write_sleep(Path(sys.argv[1]), {sys.argv[2]: 1}, is_training=True)"
        )
        command = [sys.executable, "-c", program, str(serving.directory), first]
        subprocess.run(command, check=True, timeout=60)
        wait_for_state(serving, "student_engine_0", "ready", 1)
        assert "student_engine_0 was left asleep by a trainer that has ended" in serving.text()
        time.sleep(2.0)
        assert state_of(serving, "student_engine_0").restarts == 1, "once is enough"
        assert state_of(serving, "student_engine_1").url == second
        assert state_of(serving, "student_engine_1").restarts == 0


def test_engines_of_a_colocated_fleet_that_cannot_sleep(setup: Setup) -> None:
    """Said before anything is started."""
    with setup.serve(overrides=("serving.placement=colocated",)) as serving:
        assert serving.wait() == 2
    assert "serving.student.max_total_tokens is null" in serving.text()
    assert not (setup.directory / "serving").exists()
