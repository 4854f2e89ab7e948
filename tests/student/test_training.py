"""Updates, checkpoints and the exchange between ranks, from the same launches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.student.conftest import Results
from tests.student.harness import make_examples
from tests.student.rank_program import AVERAGE_DECAY

LAUNCHES = ["one_rank", "two_ranks", "four_ranks"]


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Over all tensors of two sets of weights."""
    assert set(ours) == set(theirs)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    request: pytest.FixtureRequest, launch: str
) -> None:
    results: Results = request.getfixturevalue(launch)
    result = results["resume_tied"]["resume"]
    assert result["resumed"] == result["straight"]
    for name, tensor in result["straight_weights"].items():
        assert torch.equal(result["resumed_weights"][name], tensor), name
    assert result["progress"] == {"step": 3, "note": "kept"}
    assert result["names"] == ["latest", "step_00000002", "step_00000003"]
    assert result["nothing"] is None


@pytest.mark.parametrize("launch", ["two_ranks", "four_ranks"])
def test_a_checkpoint_continues_on_another_layout(
    request: pytest.FixtureRequest, launch: str
) -> None:
    results: Results = request.getfixturevalue(launch)
    straight = results["resume_tied"]["resume"]
    resharded = results["resharded"]["load_checkpoint"]
    for ours, theirs in zip(resharded["results"], straight["straight"][2:], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        assert ours.lr == theirs.lr
    # Adam turns rounding noise of tiny gradients into steps of up to the learning rate.
    assert largest_difference(resharded["weights"], straight["straight_weights"]) < 1e-4


def test_losses_fall_and_are_reported(one_rank: Results) -> None:
    results = one_rank["train"]["train"]["results"]
    losses = [result.loss for result in results]
    assert losses == sorted(losses, reverse=True)
    assert {result.num_tokens for result in results} == {
        sum(example.num_loss_tokens for example in make_examples())
    }
    # Warm-up over one update, then a cosine that ends after the sixth of six updates.
    rates = [1e-3 * (1 + np.cos(np.pi * step / 6)) / 2 for step in range(3)]
    assert [result.lr for result in results] == pytest.approx(rates)
    assert all(result.grad_norm > 0 for result in results)


@pytest.mark.parametrize(
    ("case", "plain_case"),
    [("dp2_distributed", "train"), ("dp2_distributed_chunked", "train_untied")],
)
def test_distributed_optimizer_makes_the_same_updates(
    one_rank: Results, two_ranks: Results, case: str, plain_case: str
) -> None:
    plain, sharded = one_rank[plain_case]["train"], two_ranks[case]["train"]
    for ours, theirs in zip(sharded["results"], plain["results"], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    assert largest_difference(sharded["weights"], plain["weights"]) < 1e-4


@pytest.mark.parametrize("case", ["tp2_bf16", "tp2_bf16_chunked"])
def test_bf16_follows_float32(one_rank: Results, two_ranks: Results, case: str) -> None:
    plain, half = one_rank["train"]["train"], two_ranks[case]["train"]
    assert next(iter(half["weights"].values())).dtype == torch.bfloat16
    for ours, theirs in zip(half["results"], plain["results"], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=0.02)


@pytest.mark.parametrize(
    ("launch", "case"), [("one_rank", "train"), ("two_ranks", "pp2"), ("two_ranks", "pp2_chunked")]
)
def test_a_mini_batch_without_loss_tokens_is_skipped(
    request: pytest.FixtureRequest, launch: str, case: str
) -> None:
    results: dict[str, Any] = request.getfixturevalue(launch)[case]["empty"]
    assert results["result"].skipped
    assert results["result"].num_tokens == 0
    assert results["weights_kept"]
    assert results["logprobs"] == []


def test_values_travel_between_ranks(two_ranks: Results) -> None:
    result = two_ranks["dp2"]["exchange"]
    for examples, nothing in result["received"]:
        assert nothing is None
        for ours, theirs in zip(examples, make_examples(), strict=True):
            assert np.array_equal(ours.token_ids, theirs.token_ids)
            assert ours.advantages.dtype == np.float32
            assert theirs.advantages is not None
            assert np.array_equal(ours.advantages, theirs.advantages)
    one, two = result["gathered"]
    np.testing.assert_array_equal(one, np.full(1, 1.0))
    np.testing.assert_array_equal(two, np.full(2, 1.25))


def test_a_wait_for_rank_zero_ends_at_its_timeout(two_ranks: Results) -> None:
    assert 0.9 < two_ranks["dp2"]["exchange"]["seconds"] < 30


def expected_average(history: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """``decay^n w_0 + (1 - decay) sum_i decay^(n - i) w_i`` in float64."""
    n = len(history) - 1
    factors = [AVERAGE_DECAY**n] + [
        (1 - AVERAGE_DECAY) * AVERAGE_DECAY ** (n - i) for i in range(1, n + 1)
    ]
    return {
        name: sum(
            (
                factor * weights[name].double()
                for factor, weights in zip(factors, history, strict=True)
            ),
            torch.zeros(()),
        ).float()
        for name in history[0]
    }


@pytest.mark.parametrize("case", ["tp2_average", "dp2_untied_mean"])
def test_the_average_is_that_of_the_weights_after_each_update(
    two_ranks: Results, case: str
) -> None:
    result = two_ranks[case]["average"]
    expected = expected_average(result["history"])
    assert largest_difference(result["straight"], expected) < 1e-6
    assert largest_difference(result["straight"], result["history"][-1]) > 1e-4
    for name, tensor in result["straight"].items():
        assert torch.equal(result["resumed"][name], tensor), name


def test_the_average_continues_on_another_layout(two_ranks: Results) -> None:
    straight = two_ranks["tp2_average"]["average"]["straight"]
    resumed = two_ranks["pp2_load"]["load_average"]["resumed"]
    # Adam turns rounding noise of tiny gradients into steps of up to the learning rate, a quarter
    # of which enters the average.
    assert largest_difference(resumed, straight) < 1e-4


def test_a_bf16_average_is_that_of_the_rounded_weights(one_rank: Results) -> None:
    result = one_rank["bf16_average"]["average"]
    for name, expected in expected_average(result["history"]).items():
        torch.testing.assert_close(result["straight"][name].float(), expected, rtol=4e-3, atol=1e-6)
        assert torch.equal(result["resumed"][name], result["straight"][name]), name


def test_checkpoints_with_and_without_an_average(one_rank: Results) -> None:
    result = one_rank["bf16_average"]["refuse_average"]
    assert "teacher.weights is average, but" in result["refusal"]
    assert "holds no average" in result["refusal"]
    assert result["progress"] == {"note": "kept"}
