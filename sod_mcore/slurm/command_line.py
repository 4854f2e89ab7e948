"""``sod slurm``: its options, and the job file that it writes."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sod_mcore.config import HUB_PREFIX, ConfigError, SodConfig, serving_field
from sod_mcore.config_file import fail, load_config
from sod_mcore.files import write_text
from sod_mcore.slurm.placement import Placement, place
from sod_mcore.slurm.request import (
    DEFAULT_MAX_RESTARTS,
    DEFAULT_WARNING_SECONDS,
    TEMPLATES,
    Request,
)
from sod_mcore.slurm.template import REPOSITORY, fill, quote, read_template

UNQUOTED_PATH = re.compile(r"[\w./+=,@-]+", re.ASCII)


def main(arguments: Sequence[str]) -> int:
    """Write a job file; returns the exit code. Bad input ends the process with one line and 2."""
    try:
        # Intermixed: overrides may stand before and after the options.
        write_job(_parser().parse_intermixed_args(arguments))
    except ConfigError as error:
        fail(str(error))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sod slurm", description="Write a job file for sbatch from a configuration."
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override one setting")
    parser.add_argument("--template", choices=TEMPLATES, required=True, help="see docs/slurm.md")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the job (default 1)")
    parser.add_argument("--engine-nodes", type=int, default=0, help="of these, for engines alone")
    parser.add_argument("--gpus-per-node", type=int, required=True, help="0: ask for no GPUs")
    parser.add_argument("--ranks-per-node", type=int, help="default: GPUs that no engine takes")
    parser.add_argument("--partition", required=True)
    parser.add_argument("--account")
    parser.add_argument("--time", required=True, help="limit of one attempt, such as 12:00:00")
    parser.add_argument(
        "--warning-seconds",
        type=int,
        default=DEFAULT_WARNING_SECONDS,
        help="time to save in before the limit (default %(default)s)",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=DEFAULT_MAX_RESTARTS,
        help="requeues of the job (default %(default)s)",
    )
    parser.add_argument("--interface", help="network interface of NCCL and gloo")
    parser.add_argument("--job-name", help="default: name of the run folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    return parser


def write_job(options: argparse.Namespace) -> None:
    """Write the job file that ``options`` describe, and say on standard error what it starts.

    Raises:
        ConfigError: configuration and request do not fit, or a file is missing.
    """
    config = load_config(SodConfig, options.config, options.overrides)
    request = Request(
        template=options.template,
        nodes=options.nodes,
        engine_nodes=options.engine_nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=options.ranks_per_node,
        partition=options.partition,
        account=options.account,
        time=options.time,
        warning_seconds=options.warning_seconds,
        max_restarts=options.max_restarts,
        interface=options.interface,
        job_name=options.job_name,
    )
    placement = place(config, request)
    check_paths(config)
    settings = [str(options.config), *options.overrides]
    text = fill(read_template(request.template), job_values(config, request, placement, settings))
    if options.output is None:
        print(text, end="")
    else:
        write_text(options.output, text)
        print(f"written; start it with: sbatch {options.output}", file=sys.stderr)
    print(describe(request, placement), file=sys.stderr)


def job_values(
    config: SodConfig, request: Request, placement: Placement, settings: list[str]
) -> dict[str, str | None]:
    """A value for each place of the templates; None leaves its line out."""
    directory = Path(config.run.directory)
    return {
        "JOB_NAME": request.job_name or _job_name(directory),
        "PARTITION": request.partition,
        "ACCOUNT": request.account,
        "TIME": request.time,
        "NODES": str(request.nodes),
        "GPUS_PER_NODE": str(request.gpus_per_node) if request.gpus_per_node else None,
        "WARNING_SECONDS": str(request.warning_seconds),
        "DIRECTORY": _unquoted("the folder of this command", Path.cwd()),
        "REPOSITORY": quote(str(REPOSITORY)),
        "PYTHON": quote(sys.executable),
        "SETTINGS": quote(*settings),
        "RUN_DIRECTORY": quote(str(directory)),
        "STOP_FILE": quote(config.run.stop_file or str(directory / "stop")),
        "RANKS_PER_NODE": str(placement.ranks_per_node),
        "WITH_ENGINES": "yes" if placement.with_engines else "no",
        "ENGINE_NODES": str(request.engine_nodes),
        "ENGINE_START_SECONDS": _start_seconds(config),
        "MAX_RESTARTS": str(request.max_restarts),
        "INTERFACE": request.interface or "",
    }


def check_paths(config: SodConfig) -> None:
    """Refuse folders and files that are missing, seen from where ``sod slurm`` runs."""
    for field_name, path in _paths(config):
        if not path.startswith(HUB_PREFIX) and not Path(path).exists():
            raise ConfigError(
                f"{field_name}: {path} does not exist; the job starts in {Path.cwd()}, so give "
                "paths from there, or absolute ones"
            )


def _paths(config: SodConfig) -> list[tuple[str, str]]:
    """Settings that name something which must be there, with what they name."""
    paths = [("student.model_path", f"{config.student.model_path}/config.json")]
    if config.run.replay is not None:
        return [*paths, ("run.replay", config.run.replay)]
    paths.append(("data.train", config.data.train))
    paths += [("evaluation.data", path) for path in config.evaluation.data_files]
    if config.tools.search_documents is not None:
        paths.append(("tools.search_documents", config.tools.search_documents))
    if config.serving is not None:
        for name, engine in config.serving.models.items():
            paths.append((f"{serving_field(name)}.model_path", f"{engine.model_path}/config.json"))
        if "/" in config.serving.python:
            paths.append(("serving.python", config.serving.python))
    return paths


def describe(request: Request, placement: Placement) -> str:
    """One line about what the job starts."""
    replicas = placement.world_size // placement.model_parallel_size
    line = (
        f"{placement.world_size} ranks on {request.trainer_nodes} node(s): {replicas} replica(s) "
        f"of {placement.model_parallel_size}"
    )
    if placement.with_engines:
        line += f"; engines on {request.engine_nodes or request.nodes} node(s)"
    if placement.idle_gpus:
        line += f"; {placement.idle_gpus} GPU(s) of each trainer node stay idle"
    return line


def _start_seconds(config: SodConfig) -> str:
    if config.serving is None:
        return "0"
    # Beyond the engines' own limit, so that its message, which names the cause, comes first.
    return str(round(config.serving.start_timeout_seconds) + 60)


def _job_name(directory: Path) -> str:
    """The run folder's name, without what a job's name cannot hold."""
    return re.sub(r"[^\w.+-]", "_", directory.resolve().name, flags=re.ASCII) or "sod"


def _unquoted(what: str, path: Path) -> str:
    if not UNQUOTED_PATH.fullmatch(str(path)):
        raise ConfigError(
            f"{what} is {str(path)!r}, which an #SBATCH line cannot hold; use a path of letters, "
            "digits and . _ + = , @ - /"
        )
    return str(path)
