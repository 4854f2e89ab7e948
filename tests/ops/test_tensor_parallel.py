"""The loss split over real processes equals the loss of one process, gradients included."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sod_mcore.ops.reference import step_weighted_kl, vocab_parallel_logprobs
from tests.ops.cases import CASES, Case, make_inputs, make_layer
from tests.ops.precise import relative_error, value_error

REPOSITORY = Path(__file__).resolve().parents[2]
Results = list[dict[str, Any]]  # rank -> what the worker wrote
TOLERANCE = 1e-5
"""Of float32: values by 1 + |b|, gradients by their norm."""


def run_ranks(world_size: int, output: Path) -> Results:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world_size}",
        "--module",
        "tests.ops.tensor_parallel_worker",
        str(output),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment["SOD_OPS"] = "fused"
    completed = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    return [torch.load(output / f"rank{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module", params=[2, 4], ids=["tp2", "tp4"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(request.param, tmp_path_factory.mktemp(f"tp{request.param}"))


def single_process(case: Case) -> dict[str, Tensor]:
    """What the worker returns, from unsplit logits in eager torch and float64."""
    logits, arguments = make_inputs(case)
    arguments = {n: v.double() if v.is_floating_point() else v for n, v in arguments.items()}
    upstream = torch.linspace(-1, 2, case.num_rows)
    first, second = (logits.double().requires_grad_() for _ in range(2))
    result = step_weighted_kl(
        first,
        vocab_size=case.vocab_size,
        group=None,
        temperature=case.temperature,
        objective=case.objective,
        **arguments,
    )
    (result.token_loss * upstream).sum().backward()
    logprobs, entropy = vocab_parallel_logprobs(
        second,
        arguments["targets"],
        vocab_size=case.vocab_size,
        temperature=case.temperature,
    )
    (logprobs * upstream - 0.5 * entropy).sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    return {
        "token_loss": result.token_loss.detach(),
        "logprobs": result.logprobs,
        "entropy": result.entropy,
        "is_clipped": result.is_clipped,
        "gradient": first.grad,
        "logprobs_gradient": second.grad,
    }


def single_process_linear(case: Case) -> dict[str, Tensor]:
    """What the worker returns of the output layer, from the whole layer and in float64."""
    _, arguments = make_inputs(case)
    hidden, weight = (tensor.double().requires_grad_() for tensor in make_layer(case))
    logits = hidden @ weight.T
    result = step_weighted_kl(
        logits,
        vocab_size=case.vocab_size,
        group=None,
        temperature=case.temperature,
        objective=case.objective,
        **{n: v.double() if v.is_floating_point() else v for n, v in arguments.items()},
    )
    logprobs, _ = vocab_parallel_logprobs(
        logits,
        arguments["targets"],
        vocab_size=case.vocab_size,
        temperature=case.temperature,
    )
    (0.5 * result.token_loss.sum() - logprobs.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "token_loss": result.token_loss.detach(),
        "logprobs": logprobs.detach(),
        "hidden_gradient": hidden.grad,
        "weight_gradient": weight.grad,
    }


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_split_equals_whole(results: Results, case: Case) -> None:
    expected = single_process(case)
    fused, eager = (
        [rank_results[name][case.name] for rank_results in results]
        for name in ("fused", "reference")
    )
    for ranks in (fused, eager):
        for rank in ranks:
            for name in ("token_loss", "logprobs", "entropy"):
                assert value_error(rank[name], expected[name]) <= TOLERANCE
            # Every rank must take the same branch of every clip, so they agree to the bit.
            for name in ("token_loss", "logprobs", "entropy", "is_clipped"):
                assert torch.equal(rank[name], ranks[0][name])
            assert torch.equal(rank["is_clipped"], expected["is_clipped"])
    for name in ("gradient", "logprobs_gradient"):
        ours, theirs = (
            torch.cat([rank[name] for rank in ranks], dim=1) for ranks in (fused, eager)
        )
        assert_precise(ours, theirs, expected[name], case)
        assert (ours[:, case.vocab_size :] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_split_output_layer_equals_whole(results: Results, case: Case) -> None:
    expected = single_process_linear(case)
    fused, eager = (
        [rank_results[name][case.name]["linear"] for rank_results in results]
        for name in ("fused", "reference")
    )
    if case.dtype == torch.float32:
        for rank in fused:
            for name in ("token_loss", "logprobs"):
                assert value_error(rank[name], expected[name]) <= TOLERANCE
    ours, theirs = (torch.cat([r["weight_gradient"] for r in ranks]) for ranks in (fused, eager))
    assert_precise(ours, theirs, expected["weight_gradient"], case)
    assert (ours[case.vocab_size :] == 0).all()
    ours, theirs = (
        torch.stack([r["hidden_gradient"].double() for r in ranks]).sum(0)
        for ranks in (fused, eager)
    )
    assert_precise(ours, theirs, expected["hidden_gradient"], case)


def assert_precise(ours: Tensor, eager: Tensor, expected: Tensor, case: Case) -> None:
    """Within 1e-5 of the norm in float32; in bf16 within twice the error of eager torch."""
    if not case.num_rows:
        return
    assert expected.norm() > 1e-2
    limit = TOLERANCE
    if case.dtype == torch.bfloat16:
        limit = 2 * relative_error(eager, expected)
    if case.name == "wide-logits":  # of magnitudes that float32 knows to 1e-5 only
        limit *= 3
    assert relative_error(ours, expected) <= limit


def test_ranks_talk_once_a_call_and_once_a_chunk(results: Results) -> None:
    expected = {"logprobs": 1, "loss": 1, "loss without rows": 1, "three chunks": 3}
    assert [rank_results["collectives"] for rank_results in results] == [expected] * len(results)
