"""Step weights of a whole batch against a plain loop over its tokens.

    .venv/bin/python -m benchmarks.step_weights [--samples 1024] [--tokens 20480]

Prints Markdown. There are two loops: one takes each token's values out of the tensors, as SOD's
public implementation does; the other turns the tensors into lists before it starts. Loops are timed
on a share of the samples and their times scaled up: they do the same to each sample.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sod_mcore.algorithm import compute_step_weights

EPSILON, DELTA = 1e-6, 0.2
TOKENS_PER_TURN, TOKENS_PER_OBSERVATION = 300, 100


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--loop-samples", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    student, teacher, mask = make_batch(options.samples, options.tokens)
    part = slice(0, options.loop_samples)

    batch, share = (student, teacher, mask), (student[part], teacher[part], mask[part])
    as_lists = [values.tolist() for values in share]
    scale = options.samples / options.loop_samples
    times: dict[str, list[float]] = {}
    for _ in range(options.repetitions):
        weights = timed(times, "compute_step_weights", 1, compute_step_weights, *batch)
        loops: dict[str, Any] = {"over tensors": share, "over lists": as_lists}
        for name, values in loops.items():
            rows = timed(times, f"loop over tokens, {name}", scale, token_loop, *values)
            torch.testing.assert_close(weights.token_weights[part], torch.tensor(rows))

    print(
        f"{options.samples} samples of {options.tokens} tokens, {torch.get_num_threads()} threads"
    )
    print("\n| | CPU seconds | of ours |\n|---|---|---|")
    ours = min(times["compute_step_weights"])
    for name, seconds in times.items():
        print(f"| {name} | {min(seconds):.2f} | {min(seconds) / ours:.0f}x |")


def timed(
    times: dict[str, list[float]], name: str, scale: float, run: Callable[..., Any], *values: Any
) -> Any:
    """Note the CPU seconds of a run, scaled up; its result."""
    start = time.process_time()
    result = run(*values)
    times.setdefault(name, []).append((time.process_time() - start) * scale)
    return result


def make_batch(num_samples: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of student and teacher, and a mask of turns between observations."""
    generator = torch.Generator().manual_seed(0)
    student = -torch.rand(num_samples, num_tokens, generator=generator)
    teacher = student + 0.5 * torch.randn(num_samples, num_tokens, generator=generator)
    offsets = torch.randint(0, 400, (num_samples, 1), generator=generator)
    position = (torch.arange(num_tokens) + offsets) % (TOKENS_PER_TURN + TOKENS_PER_OBSERVATION)
    return student, teacher, position < TOKENS_PER_TURN


def token_loop(student: Any, teacher: Any, mask: Any) -> list[list[float]]:
    """Token weights: walk over the tokens once for the means, once for the weights."""
    rows = []
    for ours, theirs, inside in zip(student, teacher, mask, strict=True):
        sums: list[float] = []
        counts: list[int] = []
        step_of: list[int] = []
        was_inside = False
        for t in range(len(inside)):
            is_inside = bool(inside[t])
            if is_inside and not was_inside:
                sums.append(0.0)
                counts.append(0)
            if is_inside:
                sums[-1] += float(abs(ours[t] - theirs[t]))
                counts[-1] += 1
            step_of.append(len(sums) - 1 if is_inside else -1)
            was_inside = is_inside
        means = [total / count for total, count in zip(sums, counts, strict=True)]
        weights = [min((means[0] + EPSILON) / (mean + EPSILON), 1 + DELTA) for mean in means]
        rows.append([weights[step] if step >= 0 else 0.0 for step in step_of])
    return rows


if __name__ == "__main__":
    main()
