"""Serves the models of a configuration, alone or around a command.

    python -m sod_mcore.serving CONFIG [key=value ...]
    python -m sod_mcore.serving CONFIG [key=value ...] -- torchrun ... pretrain_sod.py CONFIG

The first form runs until SIGINT, SIGTERM, SIGHUP or SIGUSR2. The second runs the command while the
models are served, passes signals on to it and ends with its exit code; with 75 where the command
was the configuration's run and was stopped (``sod_mcore/outcome.py``), which torchrun cannot tell.
Either way no process is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sod_mcore.config import ConfigError, ServingConfig, SodConfig
from sod_mcore.config_file import fail, load_config
from sod_mcore.outcome import (
    ENDED_FILE,
    EXIT_FAILED,
    EXIT_STOPPED,
    Outcome,
    read_outcome,
    write_outcome,
)
from sod_mcore.serving.cuda_ipc import check_cuda_ipc
from sod_mcore.serving.endpoints import Endpoints, FleetError, endpoints_path
from sod_mcore.serving.fleet.children import Child, forward_signal, shell_exit_code
from sod_mcore.serving.fleet.places import POLL_SECONDS
from sod_mcore.serving.fleet.supervisor import Fleet
from sod_mcore.serving.placement import check_placement

USAGE = "usage: python -m sod_mcore.serving CONFIG [key=value ...] [-- command ...]"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
"""SIGUSR2 because SLURM's srun passes it on, while of a SIGTERM it makes a SIGKILL."""
PASSED_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1)


def main(arguments: Sequence[str]) -> int:
    """Serve as the arguments say; returns the exit code."""
    arguments = list(arguments)
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    split = arguments.index("--") if "--" in arguments else len(arguments)
    settings, command = arguments[:split], arguments[split + 1 :]
    if not settings or (split < len(arguments) and not command):
        fail(USAGE)
    try:
        config = load_config(SodConfig, Path(settings[0]), settings[1:])
        if config.serving is None:
            raise ConfigError("serving is missing; nothing to serve without that section")
        check_placement(config)
        check_cuda_ipc(config)
        before = _outcome_written(config)
        try:
            code = asyncio.run(_serve(config, config.serving, command))
        except FleetError as error:
            return _report_dead_fleet(config, error, before)
        return _report_command(config, code, before) if command else code
    except ConfigError as error:
        fail(str(error))


def _report_dead_fleet(config: SodConfig, error: FleetError, before: int | None) -> int:
    """Say why, after all that the command printed; the run failed, even if it could still save."""
    if _outcome_written(config) != before:
        directory = Path(config.run.directory)
        outcome = read_outcome(directory)
        steps = outcome.completed_steps if outcome is not None else 0
        write_outcome(directory, Outcome("failed", steps, str(error).partition(";")[0]))
    print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_FAILED


def _report_command(config: SodConfig, code: int, before: int | None) -> int:
    """The exit code for the command; if it failed, the last line printed tells why."""
    outcome = None
    if _outcome_written(config) != before:
        outcome = read_outcome(Path(config.run.directory))
    if outcome is not None and outcome.outcome == "stopped":
        return EXIT_STOPPED
    if code != 0:
        reason = f": {outcome.reason}" if outcome is not None else ""
        problem = f"error: the command ended with exit code {code}{reason}"
        print(problem, file=sys.stderr, flush=True)
    return code


def _outcome_written(config: SodConfig) -> int | None:
    """When the run last said how it ended, in nanoseconds; None if it has not."""
    with contextlib.suppress(FileNotFoundError):
        return (Path(config.run.directory) / ENDED_FILE).stat().st_mtime_ns
    return None


@dataclass
class _Signals:
    """Signals received, and the command that gets them."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    command: Child | None = None

    def receive(self, number: signal.Signals) -> None:
        if self.command is not None:
            forward_signal(self.command, number)
        elif number in STOP_SIGNALS:
            self.stop.set()


async def _serve(config: SodConfig, serving: ServingConfig, command: Sequence[str]) -> int:
    """Serve until the command or a signal ends it; nothing runs any more on return.

    Raises:
        FleetError: the models could not be served, or an engine died too often.
    """
    directory = config.serving_directory
    signals = _Signals()
    loop = asyncio.get_running_loop()
    for number in PASSED_SIGNALS:
        loop.add_signal_handler(number, signals.receive, number)
    fleet = Fleet(serving, directory, say=_say)
    try:
        endpoints = await _unless_stopped(fleet, signals.stop)
        if endpoints is None:
            return 128 + signal.SIGTERM
        _print_addresses(endpoints, directory)
        if command:
            grace_seconds = config.run.stop_grace_seconds
            return await _run_command(fleet, signals, command, grace_seconds)
        return await _run_until_stopped(fleet, signals.stop)
    finally:
        _say("stopping")
        await fleet.stop()


async def _unless_stopped(fleet: Fleet, stop: asyncio.Event) -> Endpoints | None:
    """Start the fleet; None if a signal came first."""
    start = asyncio.create_task(fleet.start())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((start, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not start.done():
        start.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await start
        return None
    return start.result()


async def _run_until_stopped(fleet: Fleet, stop: asyncio.Event) -> int:
    watch = asyncio.create_task(fleet.watch())
    stopped = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait((watch, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    watch.cancel()
    if watch in done:
        watch.result()
    return 0


async def _run_command(
    fleet: Fleet, signals: _Signals, command: Sequence[str], grace_seconds: float
) -> int:
    """Run the command while the fleet lives.

    Args:
        grace_seconds: what the run's ranks need at most after a signal; torchrun must wait a little
            longer before it kills them, and we before we kill torchrun.
    """
    shutdown = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(grace_seconds) + 3)}
    try:
        child = fleet.children.start(
            "the command",
            command,
            environment={**shutdown, **os.environ},
            grace_seconds=grace_seconds + 6,
        )
    except OSError as error:
        raise FleetError(f"the command cannot be started: {error}") from error
    signals.command = child
    watch = asyncio.create_task(fleet.watch())
    try:
        while child.exit_code is None:
            if watch.done():
                watch.result()
            await asyncio.sleep(POLL_SECONDS)
    finally:
        watch.cancel()
        signals.command = None
    return shell_exit_code(child.exit_code)


def _print_addresses(endpoints: Endpoints, directory: Path) -> None:
    for model in endpoints.models.values():
        _say(f"{model.name}: {model.route} -> {', '.join(model.engines)}")
    _say(f'front door: {endpoints.front_door} (choose with the field "model")')
    _say(f"addresses written to {endpoints_path(directory)}")


def _say(line: str) -> None:
    print(f"[serving] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
