"""The clipped loss against hand-checked vectors, a token-by-token loop and finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sod_mcore.algorithm import policy_loss
from tests.algorithm import slow_reference


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


@pytest.mark.parametrize(
    ("new", "advantage", "loss", "gradient"),
    [
        pytest.param(-1.0, 0.5, -0.5, -0.5, id="on-policy"),
        pytest.param(-0.6, 0.5, -0.64, 0.0, id="clipped-above"),
        pytest.param(-1.4, 0.5, -0.335160, -0.335160, id="good-token-lost-probability"),
        pytest.param(-1.4, -0.5, 0.4, 0.0, id="clipped-below"),
        pytest.param(-0.6, -0.5, 0.745912, 0.745912, id="bad-token-gained-probability"),
        pytest.param(1.0, -0.5, 1.5, 0.0, id="dual-clip"),
    ],
)
def test_vectors(new: float, advantage: float, loss: float, gradient: float) -> None:
    logprobs = row(new).requires_grad_()
    result = policy_loss(logprobs, row(-1.0), row(advantage), row(1.0))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-5)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-5)
    assert result.clip_fraction.item() + result.dual_clip_fraction.item() == (gradient == 0.0)
    assert result.approx_kl.item() == pytest.approx(-1.0 - new, abs=1e-6)


def test_metrics_are_shares_of_the_masked_tokens() -> None:
    new = row(-0.6, -1.0, 1.0, -1.4, 7.0)
    old = row(-1.0, -1.0, -1.0, -1.0, -1.0)
    result = policy_loss(new, old, row(0.5, 0.5, -0.5, -0.5, 9.0), row(1, 1, 1, 1, 0))
    assert result.clip_fraction.item() == 0.5
    assert result.dual_clip_fraction.item() == 0.25
    assert result.approx_kl.item() == pytest.approx(-0.5)
    expected = row(-0.64, -0.5, 1.5, 0.4, 0.0)
    torch.testing.assert_close(result.token_loss, expected, atol=1e-5, rtol=0)
    assert result.loss.item() == pytest.approx((-0.64 - 0.5 + 1.5 + 0.4) / 4, abs=1e-5)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e4])
@pytest.mark.parametrize("use_tis", [False, True])
def test_garbage_outside_the_mask_reaches_neither_loss_nor_gradient(
    garbage: float, use_tis: bool
) -> None:
    def run(*padding: float) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = row(-0.9, -1.2, *padding).requires_grad_()
        old, advantages = row(-1.0, -1.0, *padding), row(0.5, -0.5, *padding)
        mask = row(1, 1, *(0.0 for _ in padding))
        options = {"rollout_logprobs": row(-1.1, -0.8, *padding), "tis_cap": 2.0} if use_tis else {}
        result = policy_loss(logprobs, old, advantages, mask, **options)  # type: ignore[arg-type]
        result.loss.backward()
        assert logprobs.grad is not None
        return torch.stack([result.loss.detach(), result.approx_kl]), logprobs.grad

    numbers, gradient = run()
    padded_numbers, padded_gradient = run(garbage, garbage)
    assert torch.equal(numbers, padded_numbers)
    assert torch.equal(padded_gradient[:, :2], gradient)
    assert padded_gradient[:, 2:].tolist() == [[0.0, 0.0]]


def test_no_masked_token_gives_zero_loss_and_gradient() -> None:
    logprobs = row(-1.0, math.nan).requires_grad_()
    result = policy_loss(logprobs, row(-1.0, -1.0), row(1.0, 1.0), row(0, 0))
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.0, 0.0]]


def test_truncated_importance_sampling() -> None:
    arguments = (row(-0.9, -0.9), row(-1.0, -1.0), row(0.5, 0.5), row(1, 1))
    plain = policy_loss(*arguments).token_loss
    rollout = row(-1.2, -5.0)
    weighted = policy_loss(*arguments, rollout_logprobs=rollout, tis_cap=2.0).token_loss
    factor = row(math.exp(0.2), 2.0)
    torch.testing.assert_close(weighted, plain * factor)


def test_dual_clip_can_be_left_out() -> None:
    result = policy_loss(row(1.0), row(-1.0), row(-0.5), row(1), dual_clip=None)
    assert result.loss.item() == pytest.approx(0.5 * math.exp(2), rel=1e-5)
    assert result.dual_clip_fraction.item() == 0.0


def test_huge_ratios_stay_finite() -> None:
    logprobs = row(-0.1).requires_grad_()
    result = policy_loss(logprobs, row(-1e4), row(-1.0), row(1), dual_clip=None)
    result.loss.backward()
    assert math.isfinite(result.loss.item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tis_cap": 2.0}, "belong together"),
        ({"rollout_logprobs": row(-1.0)}, "belong together"),
        ({"rollout_logprobs": row(-1.0), "tis_cap": 0.0}, "tis_cap=0.0"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"clip_high": -0.1}, "clip_high=-0.1"),
        ({"dual_clip": 1.0}, "dual_clip=1.0"),
    ],
)
def test_constants_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(row(-1.0), row(-1.0), row(1.0), row(1.0), **options)


TOKEN = st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.floats(-4, 4), st.booleans())


@given(
    st.lists(TOKEN, min_size=1, max_size=20),
    st.floats(0, 1),
    st.floats(0, 2),
    st.floats(1.1, 5),
)
@settings(max_examples=200, deadline=None)
def test_equals_the_loop_token_by_token(
    tokens: list[tuple[float, float, float, bool]], low: float, high: float, dual: float
) -> None:
    new, old, advantage, mask = (
        torch.tensor([[token[i] for token in tokens]], dtype=torch.float64) for i in range(4)
    )
    result = policy_loss(
        new, old, advantage, mask, clip_low=low, clip_high=high, dual_clip=dual
    ).token_loss
    expected = [
        slow_reference.clipped_loss(n, o, a, low, high, dual) if m else 0.0 for n, o, a, m in tokens
    ]
    assert result[0].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
