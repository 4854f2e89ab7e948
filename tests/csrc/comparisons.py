"""What the CUDA kernels are held to: the CPU kernels, and eager torch in float64.

Also a program, for a process that has a sanitizer's library preloaded:

    python -m tests.csrc.comparisons MODULE CASE...
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sod_mcore.ops import reference
from tests.csrc.emulation.build import load_module
from tests.csrc.kernel_cases import (
    BFLOAT16,
    CASES,
    Case,
    Inputs,
    make_inputs,
    run,
    run_logprobs,
    same_bits,
)

TOLERANCE = 1e-5  # |a - b| <= tolerance (1 + |b|)
BFLOAT16_STEP = 2.0**-7  # the largest relative distance of two neighbours


def compare_with_cpu(extension: ModuleType, case: Case) -> None:
    """Every output of every kernel, NaN and zeros included."""
    inputs = make_inputs(case)
    cpu = run(extension, extension.Cpu(num_threads=1), case, inputs)
    cuda = run(extension, extension.Cuda(stream=0), case, inputs)
    maxima = slice(0, 3 * case.world_size, 3)
    assert same_bits(cuda["statistics"][:, maxima], cpu["statistics"][:, maxima])
    picked = slice(3 * case.world_size, None)
    assert same_bits(cuda["statistics"][:, picked], cpu["statistics"][:, picked])
    assert torch.equal(cuda["is_clipped"], cpu["is_clipped"])
    for name, expected in cpu.items():
        step = BFLOAT16_STEP if name == "gradient" and case.dtype == BFLOAT16 else 0.0
        assert_close(f"{case.name}: {name}", cuda[name].float(), expected.float(), step)
    if case.logits != "nan":
        assert all(bool(values.isfinite().all()) for name, values in finite_outputs(cuda).items())


def finite_outputs(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that hold no infinity; the log-probs of absent and of masked ids do."""
    others = ("statistics", "topk_logprobs", "logprobs")
    return {name: values for name, values in outputs.items() if name not in others}


def compare_with_reference(extension: ModuleType, case: Case) -> None:
    """Loss and gradient against eager torch in float64 on the whole vocabulary."""
    inputs = make_inputs(case)
    cuda = run(extension, extension.Cuda(stream=0), case, inputs)
    loss, gradient = reference_loss_and_gradient(case, inputs)
    assert_close(f"{case.name}: token_loss", cuda["token_loss"].double(), loss, 0.0)
    step = BFLOAT16_STEP if case.dtype == BFLOAT16 else 0.0
    assert_close(f"{case.name}: gradient", cuda["gradient"].double(), gradient, step)


def reference_loss_and_gradient(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """``[N]`` and ``[N, vocab_size]``, float64."""
    logits = inputs.logits.double().requires_grad_()
    values: dict[str, Any] = {**inputs.values}
    result = reference.step_weighted_kl(
        logits,
        inputs.targets,
        vocab_size=case.vocab_size,
        group=None,
        temperature=case.temperature,
        teacher_topk_ids=inputs.topk_ids,
        objective=case.objective,
        **values,
    )
    upstream = torch.ones(case.num_rows) if inputs.upstream is None else inputs.upstream
    (result.token_loss * upstream).sum().backward()
    assert logits.grad is not None
    return result.token_loss.detach(), logits.grad


def compare_logprobs_with_cpu(extension: ModuleType, case: Case) -> None:
    """The coefficients for gradients of log-probs and entropies."""
    inputs = make_inputs(case)
    cpu = run_logprobs(extension, extension.Cpu(num_threads=1), case, inputs)
    cuda = run_logprobs(extension, extension.Cuda(stream=0), case, inputs)
    assert_close(f"{case.name}: log-prob gradient", cuda, cpu, 0.0)


def assert_close(what: str, actual: Tensor, expected: Tensor, step: float) -> None:
    """Equal but for rounding: to float32, and to a type whose neighbours are a step apart."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    allowed = TOLERANCE * (1 + expected.abs()) + step * expected.abs()
    near = (actual - expected).abs() <= allowed
    wrong = ~(same | near)
    assert not bool(wrong.any()), f"{what}: {actual[wrong][:5]} must be {expected[wrong][:5]}"


def main(path: str, *names: str) -> None:
    """Compare the named cases."""
    extension = load_module(Path(path))
    for case in CASES:
        if case.name in names:
            compare_with_cpu(extension, case)
            print(case.name, "is the same on both", flush=True)
    compare_logprobs_with_cpu(extension, CASES[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
