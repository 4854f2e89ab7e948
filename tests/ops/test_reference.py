"""The eager operations in one process, against the whole-vocabulary formulas in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sod_mcore.algorithm import policy_loss
from sod_mcore.ops import Objective, StepWeightedKL
from sod_mcore.ops.reference import step_weighted_kl, vocab_parallel_logprobs
from tests.ops.cases import CASES, EVERYTHING, Case, make_inputs
from tests.ops.full_vocabulary import token_terms

PARAMETERS = [pytest.param(case, id=case.name) for case in CASES]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def run(case: Case, logits: Tensor, arguments: dict[str, Any], **changes: Any) -> StepWeightedKL:
    options: dict[str, Any] = {
        "vocab_size": case.vocab_size,
        "group": None,
        "temperature": case.temperature,
        "objective": case.objective,
        "validate": True,
    }
    return step_weighted_kl(logits, **{**options, **arguments, **changes})


def gradient_of(case: Case, logits: Tensor, arguments: dict[str, Any], **changes: Any) -> Tensor:
    logits = logits.detach().clone().requires_grad_()
    run(case, logits, arguments, **changes).token_loss.sum().backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("case", PARAMETERS)
def test_loss_and_gradient_equal_the_whole_vocabulary_formula(case: Case) -> None:
    logits, arguments = make_inputs(case)
    logits.requires_grad_()
    upstream = torch.linspace(-1, 2, case.num_rows)
    result = run(case, logits, arguments)
    (result.token_loss * upstream).sum().backward()

    expected_logits = logits.detach().double().requires_grad_()
    rows = token_terms(
        expected_logits,
        vocab_size=case.vocab_size,
        temperature=case.temperature,
        objective=case.objective,
        **arguments,
    )
    losses = [torch.stack(list(row.values())).sum() for row in rows]
    expected = torch.stack(losses) if losses else expected_logits.sum(1)
    (expected * upstream).sum().backward()

    assert result.token_loss.dtype == torch.float32
    torch.testing.assert_close(result.token_loss.double(), expected, rtol=2e-5, atol=2e-5)
    assert logits.grad is not None
    assert logits.grad.dtype == case.dtype
    assert expected_logits.grad is not None
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(
        logits.grad.double(), expected_logits.grad, rtol=tolerance, atol=tolerance / 10
    )
    assert (logits.grad[:, case.vocab_size :] == 0).all()
    for name, values in result.terms.items():
        expected_term = torch.tensor([row[name].item() for row in rows])
        torch.testing.assert_close(values, expected_term.float(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        torch.stack(list(result.terms.values())).sum(0), result.token_loss.detach()
    )


@pytest.mark.parametrize("case", PARAMETERS)
def test_reported_values(case: Case) -> None:
    logits, arguments = make_inputs(case)
    result = run(case, logits, arguments)
    scaled = logits[:, : case.vocab_size].double() / case.temperature
    logprobs = scaled.log_softmax(-1)
    sampled = logprobs.gather(1, arguments["targets"][:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    torch.testing.assert_close(result.logprobs.double(), sampled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    ratio = (sampled - arguments["old_logprobs"]).exp()
    torch.testing.assert_close(result.ratio.double(), ratio, rtol=1e-4, atol=1e-5)
    alone, entropy_alone = vocab_parallel_logprobs(
        logits, arguments["targets"], vocab_size=case.vocab_size, temperature=case.temperature
    )
    assert torch.equal(alone, result.logprobs)
    assert torch.equal(entropy_alone, result.entropy)


def test_clipped_tokens_are_those_without_policy_gradient() -> None:
    case = Case("clip", 19, 19, 64, Objective(), seed=3)
    logits, arguments = make_inputs(case)
    arguments["old_logprobs"] = arguments["old_logprobs"] - 0.5 * torch.randn(64)
    result = run(case, logits, arguments)
    without_gradient = gradient_of(case, logits, arguments).abs().sum(1) == 0
    assert torch.equal(result.is_clipped, without_gradient)
    assert 0 < result.is_clipped.sum() < 64
    whole = policy_loss(
        result.logprobs[None],
        arguments["old_logprobs"][None],
        arguments["advantages"][None],
        torch.ones(1, 64),
    )
    share = whole.clip_fraction + whole.dual_clip_fraction
    assert share.item() == pytest.approx(result.is_clipped.float().mean().item())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_gradcheck_in_float64(divergence: Any) -> None:
    objective = Objective(
        k2_coefficient=0.3,
        k3_coefficient=0.2,
        topk_divergence=divergence,
        topk_coefficient=0.7,
        jsd_beta=0.4,
        entropy_coefficient=0.1,
    )
    case = Case("gradcheck", 11, 13, 5, objective, temperature=0.8, top_k=3, scale=1.0)
    logits, arguments = make_inputs(case)
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: run(case, z, arguments).token_loss, (logits,))


def test_gradcheck_of_logprobs_and_entropy() -> None:
    case = Case("gradcheck", 11, 13, 5, Objective(), scale=1.0)
    logits, arguments = make_inputs(case)
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: vocab_parallel_logprobs(z, arguments["targets"], vocab_size=11, temperature=1.5),
        (logits,),
    )


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_padding_columns_never_matter(garbage: float) -> None:
    case = Case("padding", 37, 48, 6, EVERYTHING)
    logits, arguments = make_inputs(case)
    poisoned = logits.clone()
    poisoned[:, case.vocab_size :] = garbage
    plain = run(case, logits, arguments).token_loss
    assert torch.equal(run(case, poisoned, arguments).token_loss, plain)
    assert torch.equal(run(case, logits[:, : case.vocab_size], arguments).token_loss, plain)
    assert torch.isfinite(gradient_of(case, poisoned, arguments)).all()


def test_columns_masked_to_minus_infinity_have_no_probability() -> None:
    case = Case("masked", 12, 12, 6, EVERYTHING, top_k=3)
    logits, arguments = make_inputs(case)
    arguments["targets"] = arguments["targets"].clamp(max=9)
    masked = torch.cat([logits, torch.full((6, 4), -torch.inf)], dim=1)
    wide = Case("wide", 16, 16, 6, EVERYTHING, top_k=3)
    result = run(wide, masked, arguments)
    torch.testing.assert_close(result.token_loss, run(case, logits, arguments).token_loss)
    gradient = gradient_of(wide, masked, arguments)
    assert torch.isfinite(gradient).all()
    assert (gradient[:, 12:] == 0).all()


def test_the_tail_keeps_its_digits_when_almost_nothing_is_left() -> None:
    """At p_R = 3e-8 the float32 difference 1 - sum p_k would be 0 or noise."""
    logits = torch.zeros(1, 8)
    logits[0, :2] = 19.0
    arguments = {
        "targets": torch.tensor([0]),
        "token_weights": torch.ones(1),
        "advantages": torch.zeros(1),
        "old_logprobs": torch.zeros(1),
        "teacher_topk_ids": torch.tensor([[0, 1]]),
        "teacher_topk_logprobs": torch.tensor([[0.45, 0.45]]).log(),
    }
    objective = Objective(topk_divergence="forward_kl", topk_coefficient=1.0)
    case = Case("tail", 8, 8, 1, objective)
    p_rest = 6 / (6 + 2 * math.exp(19.0))
    expected = 0.9 * math.log(0.9 / (1 - p_rest)) + 0.1 * math.log(0.1 / p_rest)
    loss = run(case, logits, arguments).token_loss
    assert loss.item() == pytest.approx(expected, rel=1e-6)


TEACHER_DEPENDENCE = [
    ("teacher_logprobs", Objective(policy_coefficient=0.0, k2_coefficient=1.0)),
    ("teacher_logprobs", Objective(policy_coefficient=0.0, k3_coefficient=1.0)),
    *(
        (
            "teacher_topk_logprobs",
            Objective(policy_coefficient=0.0, topk_coefficient=1.0, topk_divergence=name),
        )
        for name in ("forward_kl", "reverse_kl", "jsd")
    ),
]


@pytest.mark.parametrize(("teacher", "objective"), TEACHER_DEPENDENCE)
def test_every_distillation_loss_has_the_teacher_in_its_gradient(
    teacher: str, objective: Objective
) -> None:
    case = Case("dependence", 37, 48, 6, objective)
    logits, arguments = make_inputs(case)
    gradient = gradient_of(case, logits, arguments)
    other = gradient_of(case, logits, {**arguments, teacher: arguments[teacher] - 0.5})
    # Row 0 has no top-K in the shared inputs, and the last one has no weight.
    assert (gradient - other)[1:-1].abs().amax(dim=1).min() > 1e-4


def test_distillation_as_an_advantage_has_the_teacher_in_its_gradient() -> None:
    case = Case("advantage", 37, 48, 6, Objective(dual_clip=None))
    logits, arguments = make_inputs(case)
    arguments["old_logprobs"] = run(case, logits, arguments).logprobs
    gap = arguments["teacher_logprobs"] - arguments["old_logprobs"]
    gradient = gradient_of(case, logits, {**arguments, "advantages": gap})
    other = gradient_of(case, logits, {**arguments, "advantages": gap - 0.5})
    assert (gradient - other).abs().amax(dim=1).min() > 1e-4


def test_token_weights_multiply_distillation_and_nothing_else() -> None:
    case = Case("weights", 37, 48, 6, EVERYTHING)
    logits, arguments = make_inputs(case)
    ones = torch.ones(6)
    plain = run(case, logits, arguments, token_weights=ones).terms
    halved = run(case, logits, arguments, token_weights=ones / 2).terms
    for name in ("policy", "entropy"):
        assert torch.equal(plain[name], halved[name])
    for name in ("k2", "k3", "topk_reverse_kl"):
        torch.testing.assert_close(plain[name] / 2, halved[name])


def test_constants_get_no_gradient() -> None:
    case = Case("constants", 37, 48, 6, EVERYTHING)
    logits, arguments = make_inputs(case)
    for name, values in arguments.items():
        if values.is_floating_point():
            arguments[name] = values.clone().requires_grad_()
    run(case, logits.requires_grad_(), arguments).token_loss.sum().backward()
    assert all(values.grad is None for values in arguments.values())


def test_terms_with_coefficient_zero_are_left_out() -> None:
    case = Case("terms", 37, 48, 6, Objective(k2_coefficient=0.1))
    logits, arguments = make_inputs(case)
    del arguments["teacher_topk_ids"], arguments["teacher_topk_logprobs"]
    assert set(run(case, logits, arguments).terms) == {"policy", "k2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.tensor([0, 1, 2, 3, 4, 37])}, r"targets holds 37; .* \[-1, 37\)"),
        ({"targets": torch.zeros(6)}, r"targets has dtype torch\.float32"),
        ({"teacher_topk_ids": torch.full((6, 5), -2)}, "teacher_topk_ids holds -2"),
        ({"teacher_topk_ids": torch.zeros(6, 5).long()}, "teacher_topk_ids holds an id twice"),
        ({"teacher_topk_ids": None}, "teacher_topk_logprobs is given without teacher_topk_ids"),
        ({"teacher_topk_logprobs": None}, "teacher_topk_logprobs are missing"),
        ({"teacher_topk_ids": torch.zeros(5, 5).long()}, r"teacher_topk_ids has shape \(5, 5\)"),
        ({"teacher_topk_ids": torch.zeros(6, 129).long()}, "K at most 128"),
        ({"advantages": torch.full((6,), math.nan)}, "advantages is not finite"),
        ({"advantages": torch.zeros(6).double()}, r"advantages has dtype torch\.float64"),
        ({"advantages": torch.zeros(6, device="meta")}, "advantages is on meta, logits on cpu"),
        ({"teacher_topk_logprobs": torch.full((6, 5), math.nan)}, "holds NaN"),
        ({"teacher_logprobs": None}, "teacher_logprobs is missing"),
        ({"teacher_logprobs": torch.full((6,), -math.inf)}, "teacher_logprobs is not finite"),
        ({"token_weights": torch.ones(5)}, r"token_weights has shape \(5,\)"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"vocab_size": 49}, "vocab_size=49"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    case = Case("bad", 37, 48, 6, EVERYTHING)
    logits, arguments = make_inputs(case)
    with pytest.raises(ValueError, match=message):
        run(case, logits, arguments, **changes)
