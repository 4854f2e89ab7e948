"""Time and memory of the fused loss against torch, Megatron-Core and, on a GPU, other kernels.

    .venv/bin/python -m benchmarks.fused_op                  # CPU
    .venv/bin/python -m benchmarks.fused_op --device cuda

Prints Markdown. Each cell compares within one run: how many times ours goes into the other. Logits
are [N, 151936]; the full loss has a clipped policy term, k3, a reverse KL on 64 candidates and the
rest, and an entropy bonus. The cross entropies compute less. Memory is what a run needs beside the
logits, in units of the logits.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.fused_op_contestants import Problem, contestants, fused_loss, make_problem
from benchmarks.measure import Measurement, geometric_mean, take_turns
from sod_mcore.ops.extension import load_extension
from sod_mcore.platform.megatron import prepare_megatron

OURS = "fused (ours)"
QWEN3_VOCABULARY = 151_936
ONE_OF_EIGHT_RANKS = 19_072
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure every cell and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="N of each cell")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU only")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    prepare_megatron()
    device = torch.device(options.device)
    rows = options.rows or ([256, 1024] if device.type == "cpu" else [8192, 32768])
    widths = [QWEN3_VOCABULARY] if device.type == "cpu" else [QWEN3_VOCABULARY, ONE_OF_EIGHT_RANKS]
    threads = options.threads if device.type == "cpu" else [1]
    print(describe_machine(device))
    with tempfile.TemporaryDirectory() as folder:
        init_single_process_group(Path(folder), device)
        try:
            ratios: dict[str, list[float]] = {}
            for width in widths:
                for num_rows in rows:
                    for dtype in DTYPES:
                        for num_threads in threads:
                            cell = (num_rows, width, dtype, num_threads)
                            for name, ratio in run_cell(cell, device, options.repetitions).items():
                                ratios.setdefault(name, []).append(ratio)
            print_means(ratios)
        finally:
            dist.destroy_process_group()


def run_cell(
    cell: tuple[int, int, str, int], device: torch.device, repetitions: int
) -> dict[str, float]:
    """Print one table; each contestant's time as a multiple of ours."""
    num_rows, width, dtype, num_threads = cell
    torch.set_num_threads(num_threads)
    problem = make_problem(num_rows, width, DTYPES[dtype], device)
    results = take_turns(contestants(problem, device), device, repetitions)
    size = problem.logits.nbytes
    title = f"N = {num_rows}, V = {width}, {dtype}"
    print(f"\n{title}, {num_threads} threads\n" if device.type == "cpu" else f"\n{title}\n")
    print("| | seconds | wall | of ours | memory beside the logits |\n|---|---|---|---|---|")
    ours = results[OURS]
    assert isinstance(ours, Measurement), f"ours: {ours}"
    ratios = {}
    for name, result in results.items():
        if isinstance(result, str):
            print(f"| {name} | {result} | | | |")
            continue
        ratios[name] = result.seconds / ours.seconds
        print(
            f"| {name} | {result.seconds:.4f} | {result.wall_seconds:.4f} | {ratios[name]:.1f}x "
            f"| {result.peak_bytes / size:.2f} |",
            flush=True,
        )
    if device.type == "cuda":
        print_cuda_details(problem, ours)
    return ratios


def print_means(ratios: dict[str, list[float]]) -> None:
    """Geometric mean and smallest ratio of each contestant."""
    print("\n| of ours | geometric mean | smallest |\n|---|---|---|")
    for name, values in ratios.items():
        if name != OURS:
            print(f"| {name} | {geometric_mean(values):.1f}x | {min(values):.1f}x |")


def print_cuda_details(problem: Problem, ours: Measurement) -> None:
    """Bandwidth as a share of a copy's, counting two reads and one write; kernels of one call."""
    copy = torch.empty_like(problem.logits)
    seconds = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        copy.copy_(problem.logits)
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    copy_rate = 2 * problem.logits.nbytes / min(seconds)
    rate = 3 * problem.logits.nbytes / ours.seconds
    logits = copy.add_(torch.zeros((), dtype=copy.dtype, device=copy.device, requires_grad=True))
    ones = torch.ones(len(logits), device=logits.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(fused_loss(problem, logits), logits, ones)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if not e.name.startswith(("cuda", "Activity"))]
    print(
        f"\nours: {rate / 1e12:.2f} TB/s, {rate / copy_rate:.0%} of a copy's "
        f"{copy_rate / 1e12:.2f} TB/s; {len(kernels)} launches: {', '.join(kernels)}"
    )


def describe_machine(device: torch.device) -> str:
    """Date, hardware and versions."""
    extension = load_extension()
    assert extension is not None, "the extension is not built: make setup"
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        hardware = f"{os.cpu_count()} {platform.machine()} cores, kernels {extension.cpu_target()}"
    return f"{datetime.now(UTC):%Y-%m-%d}, {hardware}, torch {torch.__version__}."


def init_single_process_group(folder: Path, device: torch.device) -> None:
    """Megatron-Core's cross entropies want a group."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = f"file://{folder / 'store'}"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1)


if __name__ == "__main__":
    main()
