"""Nothing of the logits' size is made beside them: by allocations, and by resident memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sod_mcore import ops
from sod_mcore.ops import reference
from tests.ops.cases import EVERYTHING
from tests.ops.precise import Problem, apply, make_problem, overwritable


class LargestAllocation(TorchDispatchMode):
    """Remembers the largest memory that an operation of torch made anew, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, result.untyped_storage().nbytes())
        return results


def largest_allocation(problem: Problem, step_weighted_kl: Callable[..., Any]) -> float:
    """In units of the logits, forward and backward."""
    logits = overwritable(problem.logits)
    with LargestAllocation() as mode:
        result = apply(step_weighted_kl, problem, logits, overwrite_logits=True)
        torch.autograd.grad(result.token_loss.sum(), logits)
    return mode.largest / logits.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_operation_makes_anything_near_the_logits_size(dtype: torch.dtype) -> None:
    problem = make_problem(EVERYTHING, num_rows=16, vocab_size=50_000, top_k=64, dtype=dtype)
    assert largest_allocation(problem, ops.step_weighted_kl) < 0.01
    # The same measure sees what eager torch makes.
    problem = make_problem(EVERYTHING, num_rows=16, vocab_size=50_000, top_k=64, dtype=dtype)
    assert largest_allocation(problem, reference.step_weighted_kl) >= 1


PROGRAM = """
import torch
from benchmarks.fused_op_contestants import fused_loss, make_problem
from benchmarks.measure import Contestant, take_turns
from tests.ops.precise import overwritable

problem = make_problem(128, 151_936, torch.{dtype}, torch.device("cpu"))
logits = overwritable(problem.logits)
run = lambda: torch.autograd.grad(fused_loss(problem, logits).sum(), logits)
measured = take_turns({{"": Contestant(lambda: None, run)}}, torch.device("cpu"), 3)[""]
print(measured.peak_bytes / problem.logits.nbytes)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_memory_does_not_grow(dtype: str) -> None:
    """In a process of its own, so that nothing else of it grows or shrinks meanwhile."""
    command = [sys.executable, "-c", PROGRAM.format(dtype=dtype)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.02
