"""The sod command: thin faces of the parts that a user or a job file calls by name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sod_mcore import config_help
from sod_mcore.config import ConfigError, SodConfig
from sod_mcore.config_file import fail, load_config
from sod_mcore.outcome import EXIT_FAILED, Outcome, read_outcome, read_outcome_before
from sod_mcore.report.summary import summarise_rollout
from sod_mcore.serving.__main__ import main as serve
from sod_mcore.serving.endpoints import FleetError
from sod_mcore.serving.fleet.joining import address_settings, wait_for_fleets
from sod_mcore.slurm.command_line import main as slurm
from sod_mcore.trajectory import RecordedBatch, Trajectory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["serve"]:
        # Handed on as it stands: what follows "--" belongs to another program.
        return serve(arguments[1:])
    if arguments[:1] == ["slurm"]:
        return slurm(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.command == "outcome":
        return print_outcome(options.config, options.overrides)
    if options.command == "wait-for-engines":
        return print_address_settings(options.folders, options.timeout)
    if options.command == "settings":
        print(config_help.reference_file(), end="")
    else:
        print(describe_batch(options.file, options.conversations))
    return 0


def print_outcome(path: Path, overrides: Sequence[str]) -> int:
    """Say how the last start of a run ended; returns the exit code that stands for it."""
    try:
        directory = Path(load_config(SodConfig, path, overrides).run.directory)
        outcome, before = read_outcome(directory), read_outcome_before(directory)
    except (ConfigError, ValueError) as error:
        fail(str(error))
    if outcome is None:
        print(f"no end: the run in {directory} was never started, still runs, or was killed")
    else:
        print(_describe_outcome(outcome))
    if before is not None:
        print(f"that start has not gone on with the run; before it: {_describe_outcome(before)}")
    return EXIT_FAILED if outcome is None else outcome.exit_code


def _describe_outcome(outcome: Outcome) -> str:
    return f"{outcome.outcome} after {outcome.completed_steps} steps: {outcome.reason}"


def print_address_settings(folders: Sequence[Path], timeout_seconds: float) -> int:
    """Print what one fleet over all engines of other fleets needs to know, one setting a line."""
    try:
        fleets = wait_for_fleets(folders, timeout_seconds)
        print("\n".join(address_settings(fleets)))
    except FleetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def describe_batch(path: Path, num_conversations: int) -> str:
    """A recorded batch as text: its metrics, then the first conversations."""
    if not path.is_file():
        fail(f"{path}: no such file; record one with pretrain_sod.py --record DIR")
    batch = RecordedBatch.load(path)
    metrics = summarise_rollout(batch)
    lines = [f"step {batch.step}, weight version {batch.weight_version}"]
    lines += [f"  {name}: {value:.4g}" for name, value in metrics.items()]
    lines += [_conversation(t) for t in batch.trajectories[:num_conversations]]
    return "\n".join(lines)


def _conversation(trajectory: Trajectory) -> str:
    head = (
        f"\n=== {trajectory.group_id}: reward {trajectory.reward:+.2f}, "
        f"{trajectory.num_turns} turns, {len(trajectory)} tokens, "
        f"ended by {trajectory.end_reason}"
    )
    return "\n".join([head, *(f"[{m['role']}] {m['content']}" for m in trajectory.messages)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sod", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="serve a configuration's models (sod_mcore.serving)")
    commands.add_parser("slurm", help="write a job file for SLURM (sod_mcore.slurm)")
    wait = commands.add_parser(
        "wait-for-engines",
        help="wait for the fleets of several nodes; print their engines as settings for one more",
    )
    wait.add_argument("folders", nargs="+", type=Path, help="serving.directory of each fleet")
    wait.add_argument("--timeout", type=float, required=True, metavar="SECONDS")
    commands.add_parser("settings", help="print every setting with its meaning, as YAML")
    outcome = commands.add_parser(
        "outcome",
        help="tell how a run ended; exit code 0: finished, 75: stopped and saved, 1: failed",
    )
    outcome.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    outcome.add_argument("overrides", nargs="*", metavar="key=value", help="override one setting")
    show = commands.add_parser("show", help="print a recorded batch")
    show.add_argument("file", type=Path, help="written by pretrain_sod.py --record")
    show.add_argument("--conversations", type=int, default=2, metavar="N", help="how many in full")
    return parser


if __name__ == "__main__":
    sys.exit(main())
