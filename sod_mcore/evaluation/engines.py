"""Engines for the time of an evaluation: those that run already, or a fleet that ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sod_mcore.config import ConfigError, EvalConfig
from sod_mcore.rollout.pool import RolloutInterruptedError
from sod_mcore.serving.endpoints import Endpoints, FleetError, read_endpoints
from sod_mcore.serving.fleet.places import POLL_SECONDS
from sod_mcore.serving.fleet.supervisor import Fleet
from sod_mcore.serving.weights.update import weight_versions

_ANSWER_SECONDS = 10.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)

Result = TypeVar("Result")
ShouldStop = Callable[[], bool]
Work = Callable[[Endpoints, ShouldStop], Result]
"""What is done while the model is served; it looks at its second argument and gives up by raising
RolloutInterruptedError."""


def with_engines(config: EvalConfig, work: Work[Result], say: Callable[[str], None]) -> Result:
    """Serve the model, do the work, stop what was started; a signal asks the work to stop.

    Raises:
        ConfigError: the engines of ``serving.directory`` serve another model.
        FleetError: the model could not be served, or an engine died too often.
        RolloutInterruptedError: a signal came.
    """
    return asyncio.run(_with_engines(config, work, say))


async def _with_engines(
    config: EvalConfig, work: Work[Result], say: Callable[[str], None]
) -> Result:
    stop = threading.Event()
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    running = _running_engines(config)
    if running is not None:
        say(f"engines of {config.serving_directory}")
        return await asyncio.to_thread(work, running, stop.is_set)
    # Nothing is distilled here, so a teacher of the same file stays out.
    serving = dataclasses.replace(config.serving, teacher=None, teachers={})
    fleet = Fleet(serving, config.serving_directory, say=say)
    try:
        endpoints = await _unless_stopped(fleet, stop)
        return await _while_served(fleet, endpoints, work, stop)
    finally:
        await fleet.stop()


def _running_engines(config: EvalConfig) -> Endpoints | None:
    """The fleet that ``serving.directory`` names, if one runs there."""
    if config.serving.directory is None:
        return None
    try:
        endpoints = read_endpoints(config.serving_directory)
    except FleetError:
        return None
    served, wanted = endpoints.model("student").model_path, config.serving.student.model_path
    if Path(served).resolve() != Path(wanted).resolve():
        raise ConfigError(
            f"serving.student.model_path is {wanted}, but the engines of serving.directory="
            f"{config.serving.directory} serve {served}; give that model, or another directory"
        )
    newest = max(weight_versions(endpoints, "student", _ANSWER_SECONDS))
    if newest > 0:
        raise ConfigError(
            f"the engines of serving.directory={config.serving.directory} hold weight version "
            f"{newest} of a training run, and not {wanted}; start others, or export these weights "
            "and evaluate the folder"
        )
    return endpoints


async def _unless_stopped(fleet: Fleet, stop: threading.Event) -> Endpoints:
    start = asyncio.create_task(fleet.start())
    while not start.done() and not stop.is_set():
        await asyncio.wait((start,), timeout=POLL_SECONDS)
    if start.done():
        return start.result()
    start.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await start
    raise RolloutInterruptedError


async def _while_served(
    fleet: Fleet, endpoints: Endpoints, work: Work[Result], stop: threading.Event
) -> Result:
    working = asyncio.create_task(asyncio.to_thread(work, endpoints, stop.is_set))
    watch = asyncio.create_task(fleet.watch())
    await asyncio.wait((working, watch), return_when=asyncio.FIRST_COMPLETED)
    if watch.done() and not working.done():
        stop.set()
        with contextlib.suppress(Exception):  # whatever it says follows from the engine's death
            await working
        watch.result()
    watch.cancel()
    return await working
