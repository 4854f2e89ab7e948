"""Divergences against float64 sums over whole distributions, and what their gradients depend on."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sod_mcore.algorithm import k1_divergence, k2_divergence, k3_divergence, topk_divergence
from sod_mcore.algorithm.divergences import TOPK_DIVERGENCES, TopKDivergence
from tests.algorithm import slow_reference

Estimator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(k1_divergence, -0.5), (k2_divergence, 0.125), (k3_divergence, math.exp(-0.5) - 0.5)],
)
def test_estimators(estimator: Estimator, expected: float) -> None:
    value = estimator(torch.tensor(-1.0, dtype=torch.float64), torch.tensor(-0.5).double())
    if estimator is k3_divergence:
        expected = math.exp(0.5) - 1 - 0.5
    assert value.item() == pytest.approx(expected)


@pytest.mark.parametrize("exponent", range(-8, 1))
def test_k3_keeps_its_digits_near_zero(exponent: int) -> None:
    gap = torch.tensor([1.0, -1.0, 0.99, 1.01, 3.0]) * 10.0**exponent
    student = torch.zeros_like(gap).requires_grad_()
    value = k3_divergence(student, gap)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    exact = gap.double()
    # The exponential series from its second term on: nothing to cancel for small gaps.
    expected = sum(exact**n / float(math.factorial(n)) for n in range(2, 60))
    torch.testing.assert_close(value.detach().double(), expected, rtol=3e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), -torch.expm1(exact), rtol=1e-6, atol=0.0)


def test_k3_does_not_overflow() -> None:
    student = torch.tensor([-1e4, -0.1]).requires_grad_()
    value = k3_divergence(student, torch.tensor([-0.1, -1e4]))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert (value >= 0).all()


def expected_gradient(
    estimator: Estimator, student_logits: torch.Tensor, teacher: torch.Tensor
) -> torch.Tensor:
    """Exact ``E_{y ~ student}[d estimator(y) / d logits]`` over a small vocabulary."""
    logprobs = student_logits.log_softmax(-1)
    values = estimator(logprobs, teacher)
    loss = (logprobs.exp().detach() * values).sum()
    return torch.autograd.grad(loss, student_logits)[0]


def distributions(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    student = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(size, generator=generator, dtype=torch.float64).log_softmax(-1)
    return student, teacher


def test_k2_has_the_gradient_of_the_reverse_kl() -> None:
    student, teacher = distributions(11)
    logprobs = student.log_softmax(-1)
    reverse_kl = (logprobs.exp() * (logprobs - teacher)).sum()
    expected = torch.autograd.grad(reverse_kl, student)[0]
    torch.testing.assert_close(expected_gradient(k2_divergence, student, teacher), expected)


def test_k3_has_the_gradient_of_the_forward_kl() -> None:
    student, teacher = distributions(11)
    forward_kl = (teacher.exp() * (teacher - student.log_softmax(-1))).sum()
    expected = torch.autograd.grad(forward_kl, student)[0]
    torch.testing.assert_close(expected_gradient(k3_divergence, student, teacher), expected)


def test_k1_as_a_loss_has_no_teacher_in_its_gradient() -> None:
    """Why it is refused as a loss: its gradient is the same for every teacher, and 0 on average."""
    student, teacher = distributions(11)
    _, other_teacher = distributions(12)
    gradient = expected_gradient(k1_divergence, student, teacher)
    assert torch.equal(gradient, expected_gradient(k1_divergence, student, other_teacher[:11]))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_k1_as_an_advantage_has_the_gradient_of_the_reverse_kl() -> None:
    student, teacher = distributions(11)
    logprobs = student.log_softmax(-1)
    reverse_kl = (logprobs.exp() * (logprobs - teacher)).sum()
    expected = torch.autograd.grad(reverse_kl, student, retain_graph=True)[0]
    advantage = -k1_divergence(logprobs, teacher).detach()
    surrogate = -(logprobs.exp().detach() * advantage * logprobs).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, student)[0], expected)


def test_a_topk_divergence_as_an_advantage_teaches_nothing() -> None:
    """Why it is refused: it does not depend on the sampled token, so its expected gradient is 0."""
    student, teacher = distributions(11)
    logprobs = student.log_softmax(-1)
    divergence = topk_divergence(logprobs[:4], teacher[:4], divergence="reverse_kl").detach()
    surrogate = (logprobs.exp().detach() * divergence * logprobs).sum()
    gradient = torch.autograd.grad(surrogate, student)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", TOPK_DIVERGENCES)
def test_the_gradient_of_a_topk_divergence_depends_on_the_teacher(name: TopKDivergence) -> None:
    student, teacher = distributions(11)
    _, other = distributions(10)

    def gradient(teacher_logprobs: torch.Tensor) -> torch.Tensor:
        values = topk_divergence(student.log_softmax(-1)[:4], teacher_logprobs, divergence=name)
        return torch.autograd.grad(values.sum(), student)[0]

    assert (gradient(teacher[:4]) - gradient(other[:4])).abs().max() > 1e-3


@pytest.mark.parametrize("name", TOPK_DIVERGENCES)
def test_mass_outside_the_topk_is_not_free(name: TopKDivergence) -> None:
    """With the K tokens in the teacher's proportions but half of their mass, it must still pull."""
    teacher = torch.tensor([0.6, 0.3]).log()
    student = (teacher + math.log(0.5)).requires_grad_()
    value = topk_divergence(student, teacher, divergence=name)
    (gradient,) = torch.autograd.grad(value, student)
    assert value > 0.05
    assert (gradient < 0).all()


PROBABILITIES = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=9)


@given(PROBABILITIES, st.data(), st.sampled_from(TOPK_DIVERGENCES), st.floats(0.05, 0.95))
@settings(max_examples=200, deadline=None)
def test_equals_the_sum_over_buckets(
    weights: list[float], data: st.DataObject, name: TopKDivergence, beta: float
) -> None:
    others = data.draw(st.lists(st.floats(0.05, 1.0), min_size=len(weights), max_size=len(weights)))
    p = [weight / sum(weights) for weight in weights]
    q = [weight / sum(others) for weight in others]
    k = data.draw(st.integers(1, len(p) - 1))
    buckets = [[*values[:k], 1 - math.fsum(values[:k])] for values in (p, q)]
    expected = slow_reference.bucket_divergence(buckets[0], buckets[1], name, beta)
    log_p, log_q = torch.tensor([p, q], dtype=torch.float64).log()
    value = topk_divergence(log_p[:k], log_q[:k], divergence=name, jsd_beta=beta)
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    with_tail = topk_divergence(
        log_p[:k],
        log_q[:k],
        divergence=name,
        jsd_beta=beta,
        student_tail_logprobs=torch.tensor(1 - math.fsum(p[:k]), dtype=torch.float64).log(),
    )
    assert with_tail.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", TOPK_DIVERGENCES)
def test_gradients_match_finite_differences(name: TopKDivergence) -> None:
    student, teacher = distributions(7)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return topk_divergence(
            logits.log_softmax(-1)[:3], teacher[:3], divergence=name, jsd_beta=0.3
        )

    assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("name", TOPK_DIVERGENCES)
def test_absent_entries_belong_to_the_rest(name: TopKDivergence) -> None:
    student, teacher = distributions(9)
    logprobs = student.log_softmax(-1)
    short = topk_divergence(logprobs[:3], teacher[:3], divergence=name)
    gradient = torch.autograd.grad(short, student, retain_graph=True)[0]
    padded_student = torch.cat([logprobs[:3], torch.tensor([math.nan, -math.inf, 5.0])])
    padded_teacher = torch.cat([teacher[:3], torch.full((3,), -math.inf, dtype=torch.float64)])
    padded = topk_divergence(padded_student, padded_teacher, divergence=name)
    assert padded.item() == pytest.approx(short.item(), rel=1e-12)
    padded_gradient = torch.autograd.grad(padded, student)[0]
    torch.testing.assert_close(padded_gradient, gradient)


@pytest.mark.parametrize("name", TOPK_DIVERGENCES)
@pytest.mark.parametrize("tail", [None, -60.0, -math.inf])
def test_certainty_stays_finite(name: TopKDivergence, tail: float | None) -> None:
    """Student and teacher put all mass on the K tokens; float32 rounds their sum to 1 or above."""
    student = torch.tensor([[0.0, -40.0], [1e-7, -math.inf]]).requires_grad_()
    teacher = torch.tensor([[0.0, -math.inf], [1e-6, -50.0]])
    tails = None if tail is None else torch.full((2,), tail)
    value = topk_divergence(student, teacher, divergence=name, student_tail_logprobs=tails)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert value.abs().max() < 1e-3


def test_arguments_are_checked() -> None:
    ones = -torch.ones(2)
    with pytest.raises(ValueError, match="divergence='k1'"):
        topk_divergence(ones, ones, divergence="k1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"jsd_beta=1\.0"):
        topk_divergence(ones, ones, divergence="jsd", jsd_beta=1.0)
    with pytest.raises(ValueError, match="must be equal"):
        topk_divergence(ones, ones[:1], divergence="reverse_kl")
