"""The chunked output layer against materialised logits: time and memory from hidden states to the
gradients of hidden states and weight.

    .venv/bin/python -m benchmarks.output_head                  # CPU
    .venv/bin/python -m benchmarks.output_head --device cuda

Prints Markdown. Both use the fused loss; the first row of a table has the logits of all rows at
once. Memory is what a run needs beside hidden states, weight and what the loss is told of each
token; both gradients are part of it.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fused_op import DTYPES, QWEN3_VOCABULARY, describe_machine
from benchmarks.fused_op_contestants import OBJECTIVE, TOP_K
from benchmarks.measure import Contestant, Measurement, take_turns
from sod_mcore import ops

MATERIALISED = "all logits at once"


def main() -> None:
    """Measure every size and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="N of each table")
    parser.add_argument("--hidden", type=int, nargs="+", help="h of each table")
    parser.add_argument("--chunks", type=int, nargs="+", help="chunk_rows of each row")
    parser.add_argument("--dtypes", choices=list(DTYPES), nargs="+", default=["bf16"])
    parser.add_argument("--threads", type=int, default=2, help="CPU only")
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args()
    device = torch.device(options.device)
    is_cpu = device.type == "cpu"
    torch.set_num_threads(options.threads)
    print(describe_machine(device))
    for num_rows in options.rows or ([4096, 8192] if is_cpu else [8192, 32768]):
        for hidden in options.hidden or ([1024] if is_cpu else [1024, 2048]):
            for dtype in options.dtypes:
                chunks = options.chunks or ([1024, 4096] if is_cpu else [1024, 2048, 4096])
                run_size(num_rows, hidden, dtype, chunks, device, options.repetitions)


def run_size(
    num_rows: int,
    hidden_size: int,
    dtype: str,
    chunks: list[int],
    device: torch.device,
    repetitions: int,
) -> None:
    """Print one table."""
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device)
    hidden = random(num_rows, hidden_size).to(DTYPES[dtype]).requires_grad_()
    weight = 2.5 / math.sqrt(hidden_size) * random(QWEN3_VOCABULARY, hidden_size)
    weight = weight.to(DTYPES[dtype]).requires_grad_()
    given = loss_inputs(num_rows, generator, device)
    runs = {MATERIALISED: partial(materialised, hidden, weight, given)}
    for rows in chunks:
        runs[f"{rows} rows at a time"] = partial(chunked, hidden, weight, given, rows, None)
        if dtype == "bf16":
            name = f"{rows} rows at a time, fp32 logits"
            runs[name] = partial(chunked, hidden, weight, given, rows, torch.float32)
    contestants = {name: Contestant(lambda: None, run) for name, run in runs.items()}
    results = take_turns(contestants, device, repetitions)

    print(f"\nN = {num_rows}, h = {hidden_size}, V = {QWEN3_VOCABULARY}, {dtype}\n")
    print("| | seconds | wall | time, of all at once | memory, MB | memory, of all at once |")
    print("|---|---|---|---|---|---|")
    base = results[MATERIALISED]
    for name, result in results.items():
        if isinstance(result, str):
            print(f"| {name} | {result} | | | | |")
            continue
        shares = ["", ""]
        if isinstance(base, Measurement):
            shares = [
                f"{result.seconds / base.seconds:.2f}",
                f"{result.peak_bytes / base.peak_bytes:.2f}",
            ]
        print(
            f"| {name} | {result.seconds:.2f} | {result.wall_seconds:.2f} | {shares[0]} "
            f"| {result.peak_bytes / 1e6:.0f} | {shares[1]} |",
            flush=True,
        )


def loss_inputs(
    num_rows: int, generator: torch.Generator, device: torch.device
) -> dict[str, Tensor]:
    """What the loss is told of each token; a teacher that knows nothing, since only time counts."""
    random = partial(torch.rand, generator=generator, device=device)
    ids = torch.randint(
        0, QWEN3_VOCABULARY // TOP_K, (num_rows, TOP_K), generator=generator, device=device
    )
    spread = torch.arange(TOP_K, device=device) * (QWEN3_VOCABULARY // TOP_K)  # distinct ids
    return {
        "targets": torch.randint(
            0, QWEN3_VOCABULARY, (num_rows,), generator=generator, device=device
        ),
        "token_weights": random(num_rows),
        "advantages": random(num_rows) - 0.5,
        "old_logprobs": -10 - random(num_rows),
        "teacher_logprobs": -10 - random(num_rows),
        "teacher_topk_ids": (ids + spread).int(),
        "teacher_topk_logprobs": -5 - random(num_rows, TOP_K),
    }


def materialised(hidden: Tensor, weight: Tensor, given: dict[str, Tensor]) -> object:
    """Output layer, fused loss, and the two products backward."""
    result = ops.step_weighted_kl(
        F.linear(hidden, weight),
        vocab_size=QWEN3_VOCABULARY,
        group=None,
        temperature=1.0,
        objective=OBJECTIVE,
        overwrite_logits=True,
        **given,
    )
    return torch.autograd.grad(result.token_loss.sum(), (hidden, weight))


def chunked(
    hidden: Tensor,
    weight: Tensor,
    given: dict[str, Tensor],
    chunk_rows: int,
    logits_dtype: torch.dtype | None,
) -> object:
    """The same in one operation."""
    result = ops.linear_step_weighted_kl(
        hidden,
        weight,
        vocab_size=QWEN3_VOCABULARY,
        group=None,
        temperature=1.0,
        objective=OBJECTIVE,
        chunk_rows=chunk_rows,
        logits_dtype=logits_dtype,
        **given,
    )
    return torch.autograd.grad(result.token_loss.sum(), (hidden, weight))


if __name__ == "__main__":
    main()
