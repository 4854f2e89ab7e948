"""Serves this machine's sandbox to others: `python -m sod_mcore.tools --port 8080`.

    python -m sod_mcore.tools --port 8080 [--host 127.0.0.1] [--workers 8] [limits, see --help]

Runs until SIGINT or SIGTERM. Where programs cannot be isolated it says why and does not serve.
"""

import argparse
import asyncio
import ipaddress
import sys
from contextlib import nullcontext

from sod_mcore.config import ConfigError
from sod_mcore.config_file import fail
from sod_mcore.tools.interface import SandboxUnavailableError
from sod_mcore.tools.limits import MEBIBYTE, MINIMUM_MEMORY_BYTES, SandboxLimits
from sod_mcore.tools.memory_group import MemoryGroup
from sod_mcore.tools.packages import package_folders
from sod_mcore.tools.sandbox import Sandbox
from sod_mcore.tools.server import READ_SECONDS, serve

_LAST_PORT = 65535
_LEAST = {"port": 0, "memory_mb": MINIMUM_MEMORY_BYTES // MEBIBYTE}
"""Of whole numbers; 1 for the others."""


def main() -> None:
    """Read the command line and serve."""
    options = _parser().parse_args()
    try:
        _check(options)
    except ValueError as error:
        fail(str(error))
    if not _is_loopback(options.host):
        print(
            f"warning: whoever reaches {options.host}:{options.port} may run programs in this "
            "sandbox; there is no authentication",
            file=sys.stderr,
            flush=True,
        )
    try:
        limits = SandboxLimits(
            wall_seconds=options.wall_seconds,
            cpu_seconds=options.cpu_seconds,
            memory_bytes=options.memory_mb * MEBIBYTE,
            processes=options.processes,
        )
        total = options.total_memory_mb
        with MemoryGroup.create(total * MEBIBYTE) if total else nullcontext() as group:
            sandbox = Sandbox(
                limits,
                max_concurrency=options.workers,
                warm_count=options.warm,
                memory_group=group,
                package_paths=package_folders(options.packages, "--packages"),
            )
            asyncio.run(
                serve(
                    sandbox,
                    options.host,
                    options.port,
                    max_requests=options.max_requests,
                    read_seconds=options.read_seconds,
                )
            )
    except (SandboxUnavailableError, ConfigError, ValueError, OSError) as error:
        fail(str(error))


def _parser() -> argparse.ArgumentParser:
    defaults = SandboxLimits()
    parser = argparse.ArgumentParser(
        prog="python -m sod_mcore.tools",
        description="Serve this machine's sandbox as a SandboxFusion endpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--workers", type=int, default=8, help="programs that run at a time")
    parser.add_argument("--warm", type=int, default=4, help="idle interpreters kept ready")
    parser.add_argument(
        "--max-requests", type=int, default=256, help="running and waiting; more get HTTP 503"
    )
    parser.add_argument(
        "--read-seconds", type=float, default=READ_SECONDS, help="that a request may arrive in"
    )
    parser.add_argument("--wall-seconds", type=float, default=60.0, help="of one program")
    parser.add_argument("--cpu-seconds", type=int, default=60, help="of each process")
    parser.add_argument("--memory-mb", type=int, default=2048, help="MiB of each process")
    parser.add_argument("--processes", type=int, default=defaults.processes, help="of one program")
    parser.add_argument("--total-memory-mb", type=int, help="MiB of all programs together")
    parser.add_argument(
        "--packages",
        metavar="DIR",
        action="append",
        default=[],
        help="folder of Python packages that programs may import; may be given several times",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError, which names the option."""
    for name, value in vars(options).items():
        option = f"--{name.replace('_', '-')}"
        least = _LEAST.get(name, 1)
        if isinstance(value, int) and value < least:
            raise ValueError(f"{option} is {value}; give at least {least}")
        if isinstance(value, float) and not value > 0:
            raise ValueError(f"{option} is {value:g}; give seconds above 0")
    if options.port > _LAST_PORT:
        raise ValueError(f"--port is {options.port}; give at most {_LAST_PORT}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    main()
