"""The CUDA kernels without a GPU: compiled by g++ and run by threads of the operating system.

What this cannot see is what only a GPU has: its rounding of exponentials, its memory model and its
speed. scripts/gpu_check.sh looks at those.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sod_mcore.ops import fused, reference
from tests.csrc.comparisons import (
    compare_logprobs_with_cpu,
    compare_with_cpu,
    compare_with_reference,
)
from tests.csrc.emulation.build import (
    REPOSITORY,
    build_common_objects,
    build_module,
    load_module,
    run_time_library,
)
from tests.csrc.kernel_cases import (
    CASES,
    FEW_CASES,
    Case,
    make_inputs,
    random_cases,
    run,
    same_bits,
)
from tests.ops import cases as op_cases
from tests.ops.precise import overwritable

SOLID_CASES = [case for case in CASES if case.logits not in ("masked", "nan")]
ONE_RANK = [case for case in CASES if case.world_size == 1]


@pytest.fixture(scope="module")
def common_objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Object files that all builds share."""
    return build_common_objects(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="module")
def extension(common_objects: list[Path]) -> ModuleType:
    """The module without a sanitizer."""
    return load_module(build_module(common_objects[0].parent, common_objects))


@pytest.mark.parametrize("case", [*CASES, *random_cases(20)], ids=lambda case: case.name)
def test_every_output_is_that_of_the_cpu_kernels(extension: ModuleType, case: Case) -> None:
    compare_with_cpu(extension, case)


def test_blocks_as_large_as_on_a_gpu(common_objects: list[Path]) -> None:
    """The other tests have smaller ones; where a thread finds its columns depends on the size."""
    folder = common_objects[0].parent
    path = build_module(folder, common_objects, has_small_blocks=False)
    extension = load_module(path)
    for dtype in (torch.float32, torch.bfloat16):
        for width in (1500, 40_000):  # blocks of 128 and of 512 threads
            case = Case("full", width - 9, width, dtype=dtype, num_rows=2, top_k=64)
            compare_with_cpu(extension, replace(case, objective=op_cases.EVERYTHING))


@pytest.mark.parametrize("case", SOLID_CASES, ids=lambda case: case.name)
def test_loss_and_gradient_are_those_of_eager_torch_in_float64(
    extension: ModuleType, case: Case
) -> None:
    compare_with_reference(extension, case)


@pytest.mark.parametrize("case", ONE_RANK, ids=lambda case: case.name)
def test_gradients_of_log_probs_are_those_of_the_cpu_kernels(
    extension: ModuleType, case: Case
) -> None:
    compare_logprobs_with_cpu(extension, case)


def op_inputs(case: op_cases.Case) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits and the other arguments of the operation."""
    logits, arguments = op_cases.make_inputs(case)
    return logits, {
        **arguments,
        "vocab_size": case.vocab_size,
        "group": None,
        "temperature": case.temperature,
        "objective": case.objective,
    }


def with_cuda_for_cpu(extension: ModuleType) -> Any:
    """The extension, whose CUDA kernels take the tensors of the CPU."""
    return SimpleNamespace(
        Cpu=lambda num_threads: extension.Cuda(stream=0),
        Shard=extension.Shard,
        TokenIds=extension.TokenIds,
        Objective=extension.Objective,
    )


@pytest.mark.parametrize("case", op_cases.CASES, ids=lambda case: case.name)
def test_the_whole_operation_runs_on_the_emulated_kernels(
    extension: ModuleType, case: op_cases.Case
) -> None:
    logits, arguments = op_inputs(case)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    emulated = fused.step_weighted_kl(with_cuda_for_cpu(extension), leaves[0], **arguments)
    eager = reference.step_weighted_kl(leaves[1], **arguments)
    emulated.token_loss.sum().backward()
    eager.token_loss.sum().backward()
    torch.testing.assert_close(emulated.token_loss, eager.token_loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(emulated.topk_logprobs, eager.topk_logprobs, rtol=1e-4, atol=1e-4)
    step = 1e-2 if case.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=step, atol=step)


def test_rows_past_element_2_to_the_31_are_found(extension: ModuleType) -> None:
    values, arguments = op_inputs(op_cases.Case("far", 37, 48, 6, op_cases.EVERYTHING))
    stride = 2**29
    # Only the pages that hold a row ever become memory.
    logits = torch.empty(5 * stride + 48).as_strided((6, 48), (stride, 1)).copy_(values)
    near, far = values.requires_grad_(), overwritable(logits)
    expected = reference.step_weighted_kl(near, **arguments).token_loss
    loss = fused.step_weighted_kl(
        with_cuda_for_cpu(extension), far, overwrite_logits=True, **arguments
    ).token_loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    [gradient] = torch.autograd.grad(loss.sum(), far)
    [expected_gradient] = torch.autograd.grad(expected.sum(), near)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_a_second_run_gives_the_same_bits(extension: ModuleType) -> None:
    case = CASES[2]
    inputs = make_inputs(case)
    first, second = (run(extension, extension.Cuda(stream=0), case, inputs) for _ in range(2))
    assert all(same_bits(first[name], second[name]) for name in first)


def start_statistics(extension: ModuleType, num_rows: int, width: int) -> None:
    """Start the first kernel with a top-K and no memory behind it."""
    ids = extension.TokenIds(
        targets=0,
        targets_are_64_bit=True,
        topk_ids=0,
        topk_ids_are_64_bit=True,
        num_topk=2,
        teacher_topk_logprobs=0,
    )
    shard = extension.Shard(
        logits=0,
        is_bfloat16=False,
        num_rows=num_rows,
        width=width,
        row_stride=width,
        num_valid_columns=width,
        first_column=0,
        inverse_temperature=1.0,
    )
    extension.Cuda(stream=0).row_statistics(shard, ids, rank=0, world_size=1, statistics=0)


def test_no_rows_start_no_kernel(extension: ModuleType) -> None:
    start_statistics(extension, num_rows=0, width=16)  # a grid of no blocks would be refused


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (1 << 20, "CUDA kernel statistics was not started: invalid argument"),
        (1 << 31, "CUDA kernel statistics: rows of 2147483648 logits are too wide"),
    ],
)
def test_rows_that_cannot_be_are_refused_by_name(
    extension: ModuleType, width: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        start_statistics(extension, num_rows=1, width=width)


def fixed_addresses(sanitizer: str) -> list[str]:
    """Addresses that a kernel scatters widely would end libtsan; not all containers allow this."""
    command = ["setarch", "-R"]
    if sanitizer != "thread" or shutil.which(command[0]) is None:
        return []
    allowed = subprocess.run([*command, "true"], capture_output=True, timeout=60, check=False)
    return command if allowed.returncode == 0 else []


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_sanitizer_finds_nothing(sanitizer: str, common_objects: list[Path]) -> None:
    module = build_module(common_objects[0].parent, common_objects, sanitizer)
    program = [sys.executable, "-m", "tests.csrc.comparisons", str(module), *FEW_CASES]
    result = subprocess.run(
        [*fixed_addresses(sanitizer), *program],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "LD_PRELOAD": run_time_library(sanitizer),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "TSAN_OPTIONS": "halt_on_error=1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("is the same on both") == len(FEW_CASES)
