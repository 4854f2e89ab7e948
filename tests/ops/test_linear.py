"""Output layer and loss in one operation, against the same in float64 and in separate steps."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sod_mcore import ops
from sod_mcore.ops import StepWeightedKL, linear, reference
from sod_mcore.ops.extension import load_extension
from tests.ops import cases
from tests.ops.precise import make_problem, relative_error, value_error

EXTENSION = load_extension()
assert EXTENSION is not None, "sod_mcore.ops._C is not built: make setup"
chunked_loss = partial(linear.linear_step_weighted_kl, EXTENSION)
chunked_logprobs = partial(linear.linear_vocab_parallel_logprobs, EXTENSION)

EVERYTHING = dataclasses.replace(cases.EVERYTHING, topk_divergence="jsd")
NUM_ROWS, HIDDEN, VOCABULARY, PADDING = 11, 24, 700, 20


@dataclasses.dataclass(frozen=True)
class Layer:
    """Hidden states and an output layer, with the inputs of a loss on its logits."""

    hidden: Tensor
    weight: Tensor
    arguments: dict[str, Any]


def make_layer(dtype: torch.dtype = torch.float32) -> Layer:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=generator).to(dtype)
    weight = (0.4 * torch.randn(VOCABULARY + PADDING, HIDDEN, generator=generator)).to(dtype)
    logits = (hidden.double() @ weight.double().T)[:, :VOCABULARY]
    problem = make_problem(EVERYTHING, logits=logits.float(), top_k=16)
    return Layer(hidden, weight, problem.arguments)


def apply(
    operation: Any, hidden: Tensor, weight: Tensor, layer: Layer, **options: Any
) -> StepWeightedKL:
    return operation(
        hidden,
        weight,
        vocab_size=VOCABULARY,
        group=None,
        temperature=0.8,
        objective=EVERYTHING,
        **{**layer.arguments, **options},
    )


def solve(
    operation: Any, layer: Layer, factor: float = 0.5, **options: Any
) -> tuple[StepWeightedKL, Tensor, Tensor]:
    """Result, and gradients of hidden states and weight."""
    hidden = layer.hidden.clone().requires_grad_()
    weight = layer.weight.clone().requires_grad_()
    result = apply(operation, hidden, weight, layer, **options)
    (factor * result.token_loss.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return result, hidden.grad, weight.grad


def in_float64(layer: Layer) -> Layer:
    return Layer(
        layer.hidden.double(),
        layer.weight.double(),
        {n: v.double() if v.is_floating_point() else v for n, v in layer.arguments.items()},
    )


@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 4096])
def test_equals_float64(chunk_rows: int) -> None:
    layer = make_layer()
    result, hidden_gradient, weight_gradient = solve(chunked_loss, layer, chunk_rows=chunk_rows)
    expected = solve(reference.linear_step_weighted_kl, in_float64(layer))
    for name in ("token_loss", "logprobs", "entropy", "ratio", "topk_logprobs"):
        assert value_error(getattr(result, name), getattr(expected[0], name)) <= 1e-5, name
    assert torch.equal(result.is_clipped, expected[0].is_clipped)
    for name, values in result.terms.items():
        assert value_error(values, expected[0].terms[name]) <= 1e-5, name
    assert relative_error(hidden_gradient, expected[1]) <= 1e-5
    assert relative_error(weight_gradient, expected[2]) <= 1e-5
    assert (weight_gradient[VOCABULARY:] == 0).all()


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_is_no_worse_than_separate_steps(logits_dtype: torch.dtype) -> None:
    layer = make_layer(torch.bfloat16)
    expected = solve(reference.linear_step_weighted_kl, in_float64(layer))
    eager = solve(reference.linear_step_weighted_kl, layer, logits_dtype=logits_dtype)
    chunked = solve(chunked_loss, layer, logits_dtype=logits_dtype, chunk_rows=4)
    assert value_error(chunked[0].logprobs, expected[0].logprobs) <= 2 * value_error(
        eager[0].logprobs, expected[0].logprobs
    )
    for ours, eagers, exact in zip(chunked[1:], eager[1:], expected[1:], strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, exact) <= 2 * relative_error(eagers, exact)


def test_float32_logits_take_bf16_noise_from_logprobs() -> None:
    layer = make_layer(torch.bfloat16)
    exact = solve(reference.linear_step_weighted_kl, in_float64(layer))[0].logprobs
    rounded = solve(chunked_loss, layer, logits_dtype=torch.bfloat16)[0].logprobs
    unrounded = solve(chunked_loss, layer, logits_dtype=torch.float32)[0].logprobs
    assert value_error(unrounded, exact) < 1e-5
    assert value_error(rounded, exact) > 1e-4


def test_gradients_of_different_tokens_cannot_differ() -> None:
    layer = make_layer()
    hidden = layer.hidden.requires_grad_()
    result = apply(chunked_loss, hidden, layer.weight, layer)
    factors = torch.ones(NUM_ROWS)
    loss = (result.token_loss * factors).sum()
    torch.autograd.grad(loss, hidden, retain_graph=True)  # equal factors, stored one by one
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, hidden)
    result = apply(chunked_loss, hidden, layer.weight, layer)
    factors[3] = 0.5
    with pytest.raises(RuntimeError, match="different gradient for each token"):
        (result.token_loss * factors).sum().backward()


def test_logprobs_are_differentiable() -> None:
    layer = make_layer()
    gradients = []
    for operation in (
        chunked_logprobs,
        reference.linear_vocab_parallel_logprobs,
    ):
        hidden = layer.hidden.clone().requires_grad_()
        weight = layer.weight.clone().requires_grad_()
        logprobs, entropy = operation(
            hidden, weight, layer.arguments["targets"], vocab_size=VOCABULARY, chunk_rows=3
        )
        (-logprobs.sum()).backward()
        gradients.append((logprobs.detach(), entropy.detach(), hidden.grad, weight.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    monkeypatch.setattr(linear._Gradients, "of", None)  # fails if called
    with torch.no_grad():
        logprobs, _ = chunked_logprobs(
            layer.hidden,
            layer.weight.requires_grad_(),
            layer.arguments["targets"],
            vocab_size=VOCABULARY,
        )
    assert not logprobs.requires_grad


def test_no_rows() -> None:
    layer = make_layer()
    empty = Layer(layer.hidden[:0], layer.weight, {n: v[:0] for n, v in layer.arguments.items()})
    result, hidden_gradient, weight_gradient = solve(chunked_loss, empty)
    assert result.token_loss.shape == (0,)
    assert hidden_gradient.shape == (0, HIDDEN)
    assert (weight_gradient == 0).all()


@pytest.mark.parametrize("is_shared", [False, True])
def test_megatrons_gradient_buffer(is_shared: bool) -> None:
    """``main_grad`` gets the gradient in float32; a shared weight's other gradient is not lost."""
    layer = make_layer(torch.bfloat16)
    expected = solve(reference.linear_step_weighted_kl, in_float64(layer))[2]
    weight: Any = torch.nn.Parameter(layer.weight.clone())
    weight.main_grad = torch.ones(weight.shape)
    weight.grad_added_to_main_grad = False
    if is_shared:
        weight.zero_out_wgrad = True
    for _ in range(2):
        result = apply(chunked_loss, layer.hidden.requires_grad_(), weight, layer)
        (0.5 * result.token_loss.sum()).backward()
    assert weight.grad_added_to_main_grad
    assert relative_error((weight.main_grad - 1) / 2, expected) < 1e-2  # bf16 logits
    assert weight.grad.shape == weight.shape
    if is_shared:
        assert (weight.grad == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(11, 25)}, r"hidden has shape \(11, 25\)"),
        ({"hidden": torch.zeros(11, 24).bfloat16()}, r"hidden is torch\.bfloat16 on cpu, weight"),
        ({"chunk_rows": 0}, "chunk_rows=0"),
        ({"logits_dtype": torch.float16}, r"logits_dtype=torch\.float16"),
        ({"advantages": torch.zeros(10)}, r"advantages has shape \(10,\)"),
        ({"vocab_size": 721}, "vocab_size=721"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    layer = make_layer()
    options: dict[str, Any] = {
        "hidden": layer.hidden,
        "weight": layer.weight,
        "vocab_size": VOCABULARY,
        "group": None,
        "temperature": 1.0,
        "objective": EVERYTHING,
    }
    for operation in (chunked_loss, reference.linear_step_weighted_kl):
        with pytest.raises(ValueError, match=message):
            operation(**{**options, **layer.arguments, **changes})


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    for choice, operation in (
        ("fused", chunked_loss),
        ("eager", reference.linear_step_weighted_kl),
    ):
        monkeypatch.setenv("SOD_OPS", choice)
        ours = solve(ops.linear_step_weighted_kl, layer)
        theirs = solve(operation, layer)
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            assert torch.equal(one, other)
