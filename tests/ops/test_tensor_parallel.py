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
from tests.ops.cases import CASES, Case, make_inputs

REPOSITORY = Path(__file__).resolve().parents[2]
Results = list[dict[str, Any]]  # rank -> what the worker wrote


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
        "token_loss": result.token_loss.detach().float(),
        "logprobs": result.logprobs.float(),
        "entropy": result.entropy.float(),
        "is_clipped": result.is_clipped,
        "gradient": first.grad.to(case.dtype),
        "logprobs_gradient": second.grad.to(case.dtype),
    }


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_split_equals_whole(results: Results, case: Case, implementation: str) -> None:
    expected = single_process(case)
    ranks = [rank_results[implementation][case.name] for rank_results in results]
    for rank in ranks:
        for name in ("token_loss", "logprobs", "entropy", "is_clipped"):
            torch.testing.assert_close(rank[name], expected[name], rtol=1e-5, atol=1e-5)
            # Every rank must take the same branch of every clip, so they agree to the bit.
            assert torch.equal(rank[name], ranks[0][name])
    for name in ("gradient", "logprobs_gradient"):
        gradient = torch.cat([rank[name] for rank in ranks], dim=1)
        assert gradient.dtype == case.dtype
        tolerance = 1e-5 if case.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance)
        assert (gradient[:, case.vocab_size :] == 0).all()
        if case.num_rows:
            assert gradient.abs().max() > 1e-3


def test_ranks_talk_once_a_call(results: Results) -> None:
    assert [rank_results["collectives"] for rank_results in results] == [1] * len(results)
