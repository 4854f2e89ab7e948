"""One rank of a tensor-parallel loss, started by torchrun: every shared case on this rank's shard.

Usage: tensor_parallel_worker.py OUTPUT_DIR. Writes ``rank<r>.pt``: implementation -> case name ->
results, and how many collectives a call of each fused operation makes.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sod_mcore import ops
from sod_mcore.ops import reference
from tests.ops.cases import CASES, Case, make_inputs, make_layer

TIMEOUT = timedelta(seconds=120)


def run_case(
    operations: Any, case: Case, rank: int, world_size: int, group: dist.ProcessGroup
) -> dict[str, Any]:
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


def run_linear(
    operations: Any, case: Case, rank: int, world_size: int, group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """The same from hidden states, on this rank's rows of the output layer, in chunks of 2."""
    _, arguments = make_inputs(case)
    hidden, weight = make_layer(case)
    hidden.requires_grad_()
    shard = weight.chunk(world_size, dim=0)[rank].clone().requires_grad_()
    options: dict[str, Any] = {
        "vocab_size": case.vocab_size,
        "group": group,
        "temperature": case.temperature,
        "chunk_rows": 2,
    }
    result = operations.linear_step_weighted_kl(
        hidden, shard, objective=case.objective, **arguments, **options
    )
    (0.5 * result.token_loss.sum()).backward()
    logprobs, _ = operations.linear_vocab_parallel_logprobs(
        hidden, shard, arguments["targets"], **options
    )
    (-logprobs.sum()).backward()  # added to the gradients of the loss
    assert hidden.grad is not None
    assert shard.grad is not None
    return {
        "token_loss": result.token_loss.detach(),
        "logprobs": logprobs.detach(),
        "hidden_gradient": hidden.grad,  # this rank's summand
        "weight_gradient": shard.grad,
    }


class CountCollectives(TorchDispatchMode):
    """Counts what is asked of process groups, by whatever function of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def count_collectives(rank: int, world_size: int, group: dist.ProcessGroup) -> dict[str, int]:
    """Collectives of each operation, forward and backward."""
    everything, no_rows = CASES[1], next(case for case in CASES if case.num_rows == 0)

    def logprobs() -> None:
        whole, arguments = make_inputs(everything)
        shard = whole.chunk(world_size, dim=1)[rank].clone().requires_grad_()
        values, _ = ops.vocab_parallel_logprobs(
            shard, arguments["targets"], vocab_size=everything.vocab_size, group=group
        )
        values.sum().backward()

    def loss(case: Case) -> None:
        whole, arguments = make_inputs(case)
        shard = whole.chunk(world_size, dim=1)[rank].clone().requires_grad_()
        result = ops.step_weighted_kl(
            shard,
            vocab_size=case.vocab_size,
            group=group,
            temperature=1.0,
            objective=case.objective,
            **arguments,
        )
        result.token_loss.sum().backward()

    def linear() -> None:
        _, arguments = make_inputs(everything)
        hidden, weight = make_layer(everything)
        result = ops.linear_step_weighted_kl(
            hidden.requires_grad_(),
            weight.chunk(world_size, dim=0)[rank].clone().requires_grad_(),
            vocab_size=everything.vocab_size,
            group=group,
            temperature=1.0,
            objective=everything.objective,
            chunk_rows=2,
            **arguments,
        )
        result.token_loss.sum().backward()

    counts = {}
    runs: dict[str, Callable[[], None]] = {
        "logprobs": logprobs,
        "loss": partial(loss, everything),
        "loss without rows": partial(loss, no_rows),
        "three chunks": linear,
    }
    for name, run in runs.items():
        with CountCollectives() as mode:
            run()
        counts[name] = mode.count
    return counts


def main() -> None:
    """Run every case in turn; a missing collective on one rank would hang or mismatch the next."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        group = dist.new_group(timeout=TIMEOUT)
        results: dict[str, Any] = {
            name: {
                case.name: run_case(operations, case, rank, world_size, group)
                | {"linear": run_linear(operations, case, rank, world_size, group)}
                for case in CASES
            }
            for name, operations in (("fused", ops), ("reference", reference))
        }
        results["collectives"] = count_collectives(rank, world_size, group)
        torch.save(results, Path(sys.argv[1]) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
