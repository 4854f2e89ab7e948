"""Compares the compiled operations on a GPU with eager torch in float64; a program, not a test.

    .venv/bin/python -m tests.ops.gpu_check            # cuda:0
    .venv/bin/python -m tests.ops.gpu_check --small    # for compute-sanitizer, which is slow
    .venv/bin/python -m tests.ops.gpu_check --small --device cpu

Ends with 1 if something differs. float32 is held to 1e-5: values by 1 + |b|, the gradient by its
norm. Of bfloat16 logits the error is compared with that of eager torch from the same logits, of
which it may be twice as much.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from functools import partial

import torch
from torch import Tensor

from sod_mcore.ops import Objective, StepWeightedKL, fused, reference
from sod_mcore.ops.extension import load_extension, missing_reason
from tests.ops.precise import (
    Operation,
    Problem,
    make_problem,
    relative_error,
    solve,
    solve_in_float64,
    value_error,
)

TOLERANCE = 1e-5
QWEN3_VOCABULARY = 151_936
OBJECTIVES = {
    "policy": Objective(),
    "entropy": Objective(policy_coefficient=0.0, entropy_coefficient=1.0),
    "forward KL": Objective(topk_divergence="forward_kl", topk_coefficient=1.0),
    "JSD": Objective(topk_divergence="jsd", topk_coefficient=1.0, jsd_beta=0.3),
    "everything": Objective(
        k2_coefficient=0.3,
        k3_coefficient=0.2,
        topk_divergence="reverse_kl",
        topk_coefficient=0.7,
        entropy_coefficient=0.05,
    ),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows, columns with and without a meaning, and K."""

    num_rows: int
    vocab_size: int
    padding: int
    top_k: int


SMALL_SHAPES = [
    Shape(5, 1000, 24, 7),
    Shape(9, 1001, 2, 64),  # rows at every address that the type allows
    Shape(4, 33_000, 16, 128),  # wide enough for the large block
]
SHAPES = [
    *SMALL_SHAPES,
    Shape(67_000, 130, 6, 3),  # more rows than the second dimension of a grid
    Shape(300, 19_072, 0, 64),  # a rank of eight
    Shape(64, QWEN3_VOCABULARY, 128, 64),
]


def main() -> int:
    """Print one line for each comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    parser.add_argument("--small", action="store_true", help="small shapes only")
    options = parser.parse_args()
    device: torch.device = options.device
    reason = missing_reason(device)
    if reason is not None:
        parser.error(reason)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        print(torch.cuda.get_device_name(device), f"torch {torch.__version__}")
    extension = load_extension()
    assert extension is not None
    operation = partial(fused.step_weighted_kl, extension)
    print("| N | V | K | logits | objective | in place | values | gradient | allowed | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    verdicts = []
    for shape in SMALL_SHAPES if options.small else SHAPES:
        for seed, (name, dtype) in enumerate(
            itertools.product(OBJECTIVES, (torch.float32, torch.bfloat16))
        ):
            problem = move(problem_of(shape, name, dtype, seed), device)
            verdicts.append(check(operation, problem, shape, name, in_place=seed % 4 < 2))
    verdicts.append(check_stream(operation, device))
    if not options.small:
        verdicts.append(check_far_rows(operation, device))
    print(f"{verdicts.count(True)} of {len(verdicts)} agree")
    return 0 if all(verdicts) else 1


def problem_of(shape: Shape, objective: str, dtype: torch.dtype, seed: int) -> Problem:
    """Temperatures alternate; every objective has its own seed."""
    return make_problem(
        OBJECTIVES[objective],
        num_rows=shape.num_rows,
        vocab_size=shape.vocab_size,
        padding=shape.padding,
        top_k=shape.top_k,
        dtype=dtype,
        temperature=(0.7, 1.0, 1.3)[seed % 3],
        seed=seed,
    )


def move(problem: Problem, device: torch.device) -> Problem:
    """The same problem on a device."""
    return dataclasses.replace(
        problem,
        logits=problem.logits.to(device),
        arguments={
            name: values if values is None else values.to(device)
            for name, values in problem.arguments.items()
        },
        upstream=problem.upstream.to(device),
    )


def check(
    operation: Operation, problem: Problem, shape: Shape, name: str, *, in_place: bool
) -> bool:
    """Whether one problem's result and gradient are near enough; prints a line."""
    exact = solve_in_float64(problem)
    values, gradient = errors(solve(operation, problem, overwrite_logits=in_place), exact)
    allowed_values = allowed_gradient = TOLERANCE
    if problem.logits.dtype == torch.bfloat16:
        eager = errors(solve(reference.step_weighted_kl, problem), exact)
        allowed_values, allowed_gradient = (max(2 * error, TOLERANCE) for error in eager)
    is_near = values <= allowed_values and gradient <= allowed_gradient
    print(
        f"| {shape.num_rows} | {shape.vocab_size} | {shape.top_k} "
        f"| {str(problem.logits.dtype).removeprefix('torch.')} | {name} | {in_place} "
        f"| {values:.1e} | {gradient:.1e} | {allowed_values:.1e}, {allowed_gradient:.1e} "
        f"| {'ok' if is_near else 'DIFFERS'} |",
        flush=True,
    )
    return is_near


def errors(
    solution: tuple[StepWeightedKL, Tensor], exact: tuple[StepWeightedKL, Tensor]
) -> tuple[float, float]:
    """Largest error of a value, and that of the gradient's norm; infinite where one is NaN."""
    (result, gradient), (exact_result, exact_gradient) = solution, exact
    pairs = [
        (getattr(result, name), getattr(exact_result, name))
        for name in ("token_loss", "logprobs", "entropy", "ratio", "topk_logprobs")
    ]
    pairs += [(result.terms[name], values) for name, values in exact_result.terms.items()]
    found = [value_error(ours, theirs) for ours, theirs in pairs]
    of_gradient = relative_error(gradient, exact_gradient)
    is_finite = all(error == error for error in [*found, of_gradient])
    return (max(found), of_gradient) if is_finite else (torch.inf, torch.inf)


def check_stream(operation: Operation, device: torch.device) -> bool:
    """Whether the kernels wait for what torch put on its current stream before them."""
    problem = move(problem_of(SMALL_SHAPES[0], "everything", torch.float32, 0), device)
    expected = solve(operation, problem)[1]
    late = dataclasses.replace(problem, logits=torch.zeros_like(problem.logits))
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles
            late.logits.copy_(problem.logits)
            gradient = solve(operation, late)[1]
        stream.synchronize()
    else:
        late.logits.copy_(problem.logits)
        gradient = solve(operation, late)[1]
    is_same = torch.equal(gradient, expected)
    print("on a stream of its own:", "ok" if is_same else "DIFFERS")
    return is_same


def check_far_rows(operation: Operation, device: torch.device) -> bool:
    """Whether rows past element 2^31 are found; those before them carry no loss."""
    shape = Shape(8, QWEN3_VOCABULARY, 0, 16)
    problem = move(problem_of(shape, "everything", torch.bfloat16, 0), device)
    exact_result, exact_gradient = solve_in_float64(problem)
    num_before = 2**31 // QWEN3_VOCABULARY + 1

    def behind(values: Tensor, filler: float) -> Tensor:
        joined = values.new_full((num_before + len(values), *values.shape[1:]), filler)
        joined[num_before:] = values
        return joined

    leaf = behind(problem.logits, torch.nan).requires_grad_()
    arguments = {
        name: behind(values, -1 if name == "targets" else 0)
        for name, values in problem.arguments.items()
    }
    logits = leaf.view_as(leaf)
    result = operation(
        logits,
        vocab_size=shape.vocab_size,
        group=None,
        temperature=problem.temperature,
        objective=problem.objective,
        overwrite_logits=True,
        **arguments,
    )
    upstream = behind(problem.upstream, 1.0)
    [gradient] = torch.autograd.grad(result.token_loss, logits, upstream)
    is_right = (
        value_error(result.token_loss[num_before:], exact_result.token_loss) <= TOLERANCE
        and relative_error(gradient[num_before:], exact_gradient) <= 2.0**-8
        and not bool(gradient[:num_before].any())
        and not bool(result.token_loss[:num_before].any())
    )
    print("rows past element 2^31:", "ok" if is_right else "DIFFER")
    return is_right


if __name__ == "__main__":
    sys.exit(main())
