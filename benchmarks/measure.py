"""How benchmarks measure: contestants in turn, the smallest of several runs, memory beside time.

On the CPU the time is that of the process on all its threads, which another program on the machine
disturbs least; on CUDA it is that between two events. Contestants take turns, so that what slows
the machine for a while slows all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Contestant:
    """What is measured.

    Attributes:
        prepare: restores what a run destroys; not measured.
        run: what is measured.
    """

    prepare: Callable[[], object]
    run: Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """The best of several runs.

    Attributes:
        seconds: CPU seconds of all threads, or seconds of the GPU.
        wall_seconds: by the clock.
        peak_bytes: memory that the run needed beside what was there before it.
    """

    seconds: float
    wall_seconds: float
    peak_bytes: float


def take_turns(
    contestants: Mapping[str, Contestant], device: torch.device, repetitions: int
) -> dict[str, Measurement | str]:
    """Measure each contestant; one that runs out of memory says so instead.

    The first round warms up (compilation included) and does not count.
    """
    results: dict[str, list[Measurement]] = {name: [] for name in contestants}
    failures: dict[str, str] = {}
    for round_number in range(repetitions + 1):
        for name, contestant in contestants.items():
            if name in failures:
                continue
            measure = _measure_cuda if device.type == "cuda" else _measure_cpu
            try:
                contestant.prepare()
                measured = measure(contestant.run)
            except torch.cuda.OutOfMemoryError:
                failures[name] = "out of memory"
                torch.cuda.empty_cache()
                continue
            if round_number:
                results[name].append(measured)
    return {
        name: failures[name] if name in failures else _best(runs) for name, runs in results.items()
    }


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _best(runs: Sequence[Measurement]) -> Measurement:
    return Measurement(
        seconds=min(run.seconds for run in runs),
        wall_seconds=min(run.wall_seconds for run in runs),
        peak_bytes=min(run.peak_bytes for run in runs),
    )


def _measure_cpu(run: Callable[[], object]) -> Measurement:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew
    before = _resident_bytes("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Measurement(cpu, wall, _resident_bytes("VmHWM") - before)


def _measure_cuda(run: Callable[[], object]) -> Measurement:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wall = time.perf_counter()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    wall = time.perf_counter() - wall
    peak = torch.cuda.max_memory_allocated() - before
    return Measurement(start.elapsed_time(end) / 1e3, wall, peak)


def _resident_bytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024.0 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {field}")
