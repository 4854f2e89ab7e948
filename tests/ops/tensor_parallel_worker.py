"""One rank of a tensor-parallel loss, started by torchrun: every shared case on this rank's shard.

Usage: tensor_parallel_worker.py OUTPUT_DIR. Writes ``rank<r>.pt``: implementation -> case name ->
results, and how many collectives a call of the fused loss makes.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from sod_mcore import ops
from sod_mcore.ops import reference
from tests.ops.cases import CASES, Case, make_inputs

TIMEOUT = timedelta(seconds=120)


def run_case(
    operations: Any, case: Case, rank: int, world_size: int, group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Loss, reported values and the gradient of this rank's shard."""
    whole, arguments = make_inputs(case)
    shard = whole.chunk(world_size, dim=1)[rank].clone().requires_grad_()
    result = operations.step_weighted_kl(
        shard,
        vocab_size=case.vocab_size,
        group=group,
        temperature=case.temperature,
        objective=case.objective,
        **arguments,
    )
    upstream = torch.linspace(-1, 2, case.num_rows)
    (result.token_loss * upstream).sum().backward()
    assert shard.grad is not None

    again = whole.chunk(world_size, dim=1)[rank].clone().requires_grad_()
    logprobs, entropy = operations.vocab_parallel_logprobs(
        again,
        arguments["targets"],
        vocab_size=case.vocab_size,
        temperature=case.temperature,
        group=group,
    )
    (logprobs * upstream - 0.5 * entropy).sum().backward()
    assert again.grad is not None
    return {
        "token_loss": result.token_loss.detach(),
        "logprobs": result.logprobs,
        "entropy": result.entropy,
        "is_clipped": result.is_clipped,
        "gradient": shard.grad,
        "logprobs_gradient": again.grad,
    }


def count_collectives(rank: int, world_size: int, group: dist.ProcessGroup) -> int:
    """All-reduces of one fused loss, forward and backward."""
    calls = []
    all_reduce = dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return all_reduce(*arguments, **options)

    with mock.patch.object(dist, "all_reduce", counted):
        whole, arguments = make_inputs(CASES[1])
        shard = whole.chunk(world_size, dim=1)[rank].clone().requires_grad_()
        result = ops.step_weighted_kl(
            shard,
            vocab_size=CASES[1].vocab_size,
            group=group,
            temperature=1.0,
            objective=CASES[1].objective,
            **arguments,
        )
        result.token_loss.sum().backward()
    return len(calls)


def main() -> None:
    """Run every case in turn; a missing collective on one rank would hang or mismatch the next."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        group = dist.new_group(timeout=TIMEOUT)
        results: dict[str, Any] = {
            name: {case.name: run_case(operations, case, rank, world_size, group) for case in CASES}
            for name, operations in (("fused", ops), ("reference", reference))
        }
        results["collectives"] = count_collectives(rank, world_size, group)
        torch.save(results, Path(sys.argv[1]) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
