"""How long a call takes: the warm sandbox, a cold one, HTTP, against a plain subprocess.

    .venv/bin/python -m benchmarks.sandbox [--calls 30] [--pause 0.2]

Prints Markdown. Each contestant runs `print(1)`; they take turns, with a pause before each call, as
a rollout has: in it the sandbox warms up its next interpreter. By the clock, from call to result.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from sod_mcore.tools import Sandbox, SandboxFusionClient

PROGRAM = "print(1)"
PYTHON = "/usr/bin/python3"  # that of the sandbox
BASELINE = "subprocess, `python3 -c`"

WARM = "warm sandbox"
OVERHEAD = "warm sandbox, beside the program's own time"

Contestant = Callable[[], Awaitable[tuple[str, float]]]
"""Gives the program's output and its own seconds, where these are known."""


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds before each call")
    options = parser.parse_args()
    times = asyncio.run(measure(options.calls, options.pause))
    baseline = statistics.median(times[BASELINE])
    load = os.getloadavg()[0]
    print(f"{options.calls} calls each, {os.cpu_count()} cores, load {load:.1f} at the end\n")
    print("| | median ms | 90 % ms | least ms | of the subprocess |\n|---|---|---|---|---|")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        slow = statistics.quantiles(seconds, n=10)[-1]
        columns = " | ".join(f"{value * 1e3:.1f}" for value in (median, slow, min(seconds)))
        print(f"| {name} | {columns} | {median / baseline:.2f}x |")


async def measure(calls: int, pause: float) -> dict[str, list[float]]:
    """Seconds of each call by contestant."""
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(Sandbox(warm_count=2))
        url = await stack.enter_async_context(LocalServer())
        client = await stack.enter_async_context(SandboxFusionClient(url))

        async def warm() -> tuple[str, float]:
            result = await sandbox.run(PROGRAM)
            return result.stdout, result.wall_seconds

        async def remote() -> tuple[str, float]:
            result = await client.run(PROGRAM)
            return result.stdout, result.wall_seconds

        contestants: dict[str, Contestant] = {
            BASELINE: plain,
            WARM: warm,
            "warm sandbox over HTTP": remote,
            "cold sandbox": cold,
        }
        times: dict[str, list[float]] = {name: [] for name in (*contestants, OVERHEAD)}
        for _ in range(calls):
            for name, contestant in contestants.items():
                await asyncio.sleep(pause)
                started = time.perf_counter()
                output, own_seconds = await contestant()
                times[name].append(time.perf_counter() - started)
                if name == WARM:
                    times[OVERHEAD].append(times[name][-1] - own_seconds)
                if output != "1\n":
                    raise RuntimeError(f"{name} gave {output!r}")
        return times


async def plain() -> tuple[str, float]:
    """A new interpreter without any isolation."""
    process = await asyncio.create_subprocess_exec(
        PYTHON, "-c", PROGRAM, stdout=asyncio.subprocess.PIPE
    )
    return (await process.communicate())[0].decode(), 0.0


async def cold() -> tuple[str, float]:
    """A sandbox that is opened for one call and closed."""
    async with Sandbox(warm_count=1, max_concurrency=1) as sandbox:
        result = await sandbox.run(PROGRAM)
        return result.stdout, result.wall_seconds


class LocalServer:
    """`python -m sod_mcore.tools` on a free port of this machine."""

    async def __aenter__(self) -> str:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sod_mcore.tools", "--port", "0", "--warm", "2"),
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            line = (await self._process.stdout.readline()).decode()
        return line.split()[1]

    async def __aexit__(self, *_: object) -> None:
        self._process.terminate()
        await self._process.wait()


if __name__ == "__main__":
    main()
