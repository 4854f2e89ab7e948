"""Every layout gives Hugging Face's log-probs, losses, gradients and tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.student.conftest import FOUR_RANKS, ONE_RANK, TWO_RANKS, Results
from tests.student.harness import Case, make_examples
from tests.student.hugging_face import Expected, expected_results
from tests.student.rank_program import EXPORT_BUCKET, OBJECTIVE

LAUNCHES = {"one_rank": ONE_RANK, "two_ranks": TWO_RANKS, "four_ranks": FOUR_RANKS}
TOLERANCE = 1e-5


def cases_with(action: str) -> list[Any]:
    """All cases that do ``action``, as pytest parameters (launch, case)."""
    return [
        pytest.param(launch, case, id=f"{launch}-{case.name}")
        for launch, cases in LAUNCHES.items()
        for case in cases
        if action in case.actions
    ]


@pytest.fixture(scope="module")
def expected(student_folder: Path) -> dict[str, Expected]:
    """Model name -> what Hugging Face computes."""
    return {
        name: expected_results(student_folder / "models" / name, make_examples(), OBJECTIVE)
        for name in ("tied", "untied", "qwen2")
    }


def results_of(request: pytest.FixtureRequest, launch: str, case: Case) -> dict[str, Any]:
    """What the case reported."""
    launched: Results = request.getfixturevalue(launch)
    return launched[case.name]


def replica_order(num_replicas: int) -> list[int]:
    """Indices of the examples in the order in which replicas report them."""
    count = len(make_examples())
    return [
        index for replica in range(num_replicas) for index in range(replica, count, num_replicas)
    ]


def num_replicas(launch: str, case: Case) -> int:
    ranks = {"one_rank": 1, "two_ranks": 2, "four_ranks": 4}[launch]
    return ranks // (case.tensor * case.pipeline)


@pytest.mark.parametrize(("launch", "case"), cases_with("logprobs"))
def test_logprobs(
    request: pytest.FixtureRequest, expected: dict[str, Expected], launch: str, case: Case
) -> None:
    logprobs = results_of(request, launch, case)["logprobs"]
    examples = make_examples()
    order = replica_order(num_replicas(launch, case))
    tolerance = 0.1 if case.precision == "bf16" else TOLERANCE
    for index, values in zip(order, logprobs, strict=True):
        mask = examples[index].loss_mask
        assert values.dtype == np.float32
        assert np.array_equal(np.isfinite(values), mask)
        reference = expected[case.model].logprobs[index].numpy()[mask[1:]]
        np.testing.assert_allclose(values[mask], reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("objective", ["sft", "objective"])
@pytest.mark.parametrize(("launch", "case"), cases_with("sft_gradient"))
def test_loss_and_gradients(
    request: pytest.FixtureRequest,
    expected: dict[str, Expected],
    launch: str,
    case: Case,
    objective: str,
) -> None:
    result = results_of(request, launch, case)[f"{objective}_gradient"]
    reference = expected[case.model]
    num_tokens = sum(example.num_loss_tokens for example in make_examples())
    loss = sum(sums["loss"] for sums in result["sums"]) / num_tokens
    assert loss == pytest.approx(getattr(reference, f"{objective}_loss"), abs=TOLERANCE)
    gradients = getattr(reference, f"{objective}_gradients")
    assert set(result["gradients"]) == set(gradients)
    for name, gradient in gradients.items():
        difference = (result["gradients"][name] - gradient).abs().max()
        assert difference <= TOLERANCE * gradient.abs().max(), name


def test_statistics_of_the_objective(one_rank: Results, expected: dict[str, Expected]) -> None:
    (sums,) = one_rank["packed"]["objective_gradient"]["sums"]
    examples = make_examples()
    ratios, advantages, gaps = [], [], []
    for example, logprobs in zip(examples, expected["tied"].logprobs, strict=True):
        assert example.old_logprobs is not None
        assert example.advantages is not None
        mask = example.loss_mask[1:]
        gap = example.old_logprobs[1:][mask] - logprobs.numpy()[mask]
        gaps.append(gap)
        ratios.append(np.exp(-gap))
        advantages.append(example.advantages[1:][mask])
    ratio, advantage = np.concatenate(ratios), np.concatenate(advantages)
    dual = (advantage < 0) & (ratio > 3.0)
    clipped = ((advantage > 0) & (ratio > 1.28)) | ((advantage < 0) & (ratio < 0.8))
    assert dual.sum() > 0
    assert sums["dual_clip_fraction"] == dual.sum()
    assert sums["clip_fraction"] == clipped.sum()
    assert sums["approx_kl"] == pytest.approx(np.concatenate(gaps).sum(), abs=1e-3)
    terms = sum(value for name, value in sums.items() if name.startswith("terms/"))
    assert terms == pytest.approx(sums["loss"], abs=1e-3)


@pytest.mark.parametrize(("launch", "case"), cases_with("round_trip"))
def test_weights_come_back_bit_for_bit(
    request: pytest.FixtureRequest, student_folder: Path, launch: str, case: Case
) -> None:
    result = results_of(request, launch, case)["round_trip"]
    source = student_folder / "models" / case.model
    stored = load_file(source / "model.safetensors")
    assert set(result["tensors"]) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(result["tensors"][name], tensor), name
    ranks = {"one_rank": 1, "two_ranks": 2, "four_ranks": 4}[launch]
    assert result["bucket_counts"] == [len(result["bucket_bytes"])] * ranks
    largest = max(tensor.nbytes for tensor in stored.values())
    assert max(result["bucket_bytes"]) <= max(EXPORT_BUCKET, 2 * largest)
    assert len(result["bucket_bytes"]) > 5

    exported = student_folder / f"ranks_{ranks}" / f"{case.name}_exported"
    reloaded = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for (name, ours), (_, theirs) in zip(
        reloaded.named_parameters(), original.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert (exported / "config.json").is_file()
    assert not list(exported.parent.glob(".*.tmp"))
