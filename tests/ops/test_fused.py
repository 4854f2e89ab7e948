"""The compiled operations against the eager definition in float64."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sod_mcore import ops
from sod_mcore.ops import Objective, StepWeightedKL, fused, reference
from sod_mcore.ops.extension import load_extension
from tests.ops.cases import EVERYTHING
from tests.ops.precise import (
    Problem,
    apply,
    make_problem,
    relative_error,
    solve,
    solve_in_float64,
    value_error,
)

EXTENSION = load_extension()
assert EXTENSION is not None, "sod_mcore.ops._C is not built: make setup"
fused_loss = partial(fused.step_weighted_kl, EXTENSION)
fused_logprobs = partial(fused.vocab_parallel_logprobs, EXTENSION)

OBJECTIVES = {
    "policy": Objective(),
    "policy without dual clip": Objective(dual_clip=None),
    "k2": Objective(policy_coefficient=0.0, k2_coefficient=1.0),
    "k3": Objective(policy_coefficient=0.0, k3_coefficient=1.0),
    "entropy": Objective(policy_coefficient=0.0, entropy_coefficient=1.0),
    "forward KL": Objective(
        policy_coefficient=0.0, topk_coefficient=1.0, topk_divergence="forward_kl"
    ),
    "reverse KL": Objective(policy_coefficient=0.0, topk_coefficient=1.0),
    "JSD 0.1": Objective(
        policy_coefficient=0.0, topk_coefficient=1.0, topk_divergence="jsd", jsd_beta=0.1
    ),
    "JSD 0.9": Objective(
        policy_coefficient=0.0, topk_coefficient=1.0, topk_divergence="jsd", jsd_beta=0.9
    ),
    "everything": EVERYTHING,
}
TOLERANCE = 1e-5
"""Of float32: values by 1 + |b|, gradients by their norm."""


def assert_precise(problem: Problem) -> None:
    """Every output and the gradient, in float32."""
    expected, expected_gradient = solve_in_float64(problem)
    result, gradient = solve(fused_loss, problem)
    assert_values_agree(result, expected)
    assert relative_error(gradient, expected_gradient) <= TOLERANCE
    assert (gradient[:, problem.vocab_size :] == 0).all()


def assert_values_agree(result: StepWeightedKL, expected: StepWeightedKL) -> None:
    for name in ("token_loss", "logprobs", "entropy", "ratio", "topk_logprobs"):
        ours, theirs = getattr(result, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == torch.float32
            assert value_error(ours, theirs) <= TOLERANCE, name
    assert torch.equal(result.is_clipped, expected.is_clipped)
    assert result.terms.keys() == expected.terms.keys()
    for name, values in result.terms.items():
        assert value_error(values, expected.terms[name]) <= TOLERANCE, name


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("top_k", [1, 7, 64, 128])
def test_every_term_and_gradient(objective: Objective, top_k: int) -> None:
    assert_precise(make_problem(objective, top_k=top_k))


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("vocab_size", [1, 15, 16, 17, 33, 1023, 1024, 1025, 5000])
def test_widths_and_temperatures(vocab_size: int, temperature: float) -> None:
    top_k = min(5, vocab_size)
    assert_precise(
        make_problem(EVERYTHING, vocab_size=vocab_size, top_k=top_k, temperature=temperature)
    )


def test_a_vocabulary_of_qwen3_with_its_padding() -> None:
    assert_precise(make_problem(EVERYTHING, num_rows=3, vocab_size=151_936, padding=128, top_k=64))


def test_without_candidates_or_teacher() -> None:
    problem = make_problem(Objective(entropy_coefficient=0.1))
    names = ("teacher_logprobs", "teacher_topk_ids", "teacher_topk_logprobs")
    bare = dataclasses.replace(problem, arguments=problem.arguments | dict.fromkeys(names))
    assert_precise(bare)
    result, _ = solve(fused_loss, bare)
    assert result.topk_logprobs is None


def test_candidates_are_scored_without_a_teacher() -> None:
    problem = make_problem(Objective())
    arguments = problem.arguments | {"teacher_topk_logprobs": None}
    assert_precise(dataclasses.replace(problem, arguments=arguments))


SPECIAL_LOGITS = {
    "all equal": torch.full((4, 500), 3.0),
    "one at +80": torch.randn(4, 500, generator=torch.Generator().manual_seed(1)).index_fill(
        1, torch.tensor([7]), 80.0
    ),
    "far from zero": 3e4 + 4 * torch.randn(4, 500, generator=torch.Generator().manual_seed(2)),
    "wide": 40 * torch.randn(4, 500, generator=torch.Generator().manual_seed(3)),
    "masked columns": torch.randn(4, 500, generator=torch.Generator().manual_seed(4)).index_fill(
        1, torch.arange(100, 300), -math.inf
    ),
}


@pytest.mark.parametrize("logits", SPECIAL_LOGITS.values(), ids=SPECIAL_LOGITS.keys())
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_special_rows(logits: Tensor, divergence: Any) -> None:
    objective = Objective(topk_coefficient=1.0, topk_divergence=divergence, entropy_coefficient=0.1)
    problem = make_problem(objective, logits=logits)
    problem.arguments["targets"][1:] = 7  # no masked column
    logprobs = problem.logits[:, :500].double().log_softmax(-1)
    problem.arguments["old_logprobs"] = logprobs.gather(1, problem.arguments["targets"][:, None])[
        :, 0
    ].float()
    assert_precise(problem)


@pytest.mark.parametrize("student_rest", [1e-7, 1e-4, 0.5, 1 - 1e-4, 1 - 1e-6])
@pytest.mark.parametrize("teacher_rest", [1e-5, 0.5, 1 - 1e-4])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_rest_of_any_size(student_rest: float, teacher_rest: float, divergence: Any) -> None:
    """1 - sum p_k and 1 - sum q_k are noise at these sizes where they are differences in fp32."""
    generator = torch.Generator().manual_seed(5)
    inside = torch.rand(4, 8, generator=generator).double()
    outside = torch.rand(4, 200, generator=generator).double()
    student = torch.cat(
        [
            inside / inside.sum(1, keepdim=True) * (1 - student_rest),
            outside / outside.sum(1, keepdim=True) * student_rest,
        ],
        dim=1,
    )
    teacher = torch.rand(4, 8, generator=generator).double()
    teacher = teacher / teacher.sum(1, keepdim=True) * (1 - teacher_rest)
    objective = Objective(policy_coefficient=0.0, topk_coefficient=1.0, topk_divergence=divergence)
    problem = make_problem(objective, logits=student.log().float(), top_k=8)
    problem.arguments["teacher_topk_ids"] = torch.arange(8).repeat(4, 1)
    problem.arguments["teacher_topk_logprobs"] = teacher.log().float()
    assert_precise(problem)


@pytest.mark.parametrize("depth", [55.0, 65.0, 75.0, 90.0])
def test_rest_far_below_the_candidates(depth: float) -> None:
    """Down to where float32 ends its columns have a gradient; below it is held, by both."""
    logits = torch.full((3, 20_000), -depth - math.log(20_000))
    logits[:, :8] = torch.linspace(0, 1, 8)
    objective = Objective(
        policy_coefficient=0.0, topk_coefficient=1.0, topk_divergence="forward_kl"
    )
    problem = make_problem(objective, logits=logits, top_k=8)
    problem.arguments["teacher_topk_ids"] = torch.arange(8).repeat(3, 1)
    problem.arguments["teacher_topk_logprobs"] = torch.full((3, 8), math.log(0.1))
    assert_precise(problem)
    # The teacher leaves 0.2, so that much gradient lies on the 20,000 columns of the rest.
    of_rest = solve(fused_loss, problem)[1][0, 8:].abs().max()
    assert (of_rest > 1e-7) == (depth < 70)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_bfloat16_is_no_worse_than_eager(objective: Objective) -> None:
    """Both work in float32 on the same bf16 logits and round the gradient once."""
    problem = make_problem(objective, num_rows=8, top_k=64, dtype=torch.bfloat16)
    expected, expected_gradient = solve_in_float64(problem)
    eager, eager_gradient = solve(reference.step_weighted_kl, problem)
    result, gradient = solve(fused_loss, problem)
    assert gradient.dtype == torch.bfloat16
    assert value_error(result.token_loss, expected.token_loss) <= max(
        2 * value_error(eager.token_loss, expected.token_loss), TOLERANCE
    )
    columns = slice(0, problem.vocab_size)
    assert relative_error(gradient, expected_gradient) <= 2 * relative_error(
        eager_gradient, expected_gradient
    )
    # Columns of little probability, where adding a dense and a sparse part would show.
    small = expected_gradient[:, columns].abs() < 1e-3 * expected_gradient.abs().max()
    errors = [
        relative_error(found[:, columns][small], expected_gradient[:, columns][small])
        for found in (gradient, eager_gradient)
    ]
    assert errors[0] <= 2 * errors[1]


def test_rows_marked_without_loss_are_not_read() -> None:
    problem = make_problem(EVERYTHING, top_k=7)
    whole, whole_gradient = solve(fused_loss, problem)
    targets = problem.arguments["targets"]
    poisoned = problem.logits.clone()
    poisoned[[1, 3]] = math.nan
    arguments = dict(problem.arguments)
    arguments["targets"] = targets.index_fill(0, torch.tensor([1, 3]), -1)
    arguments["advantages"] = torch.tensor([0.0, math.nan, 0.0, math.nan, 0.0]) + torch.nan_to_num(
        problem.arguments["advantages"]
    )
    marked = dataclasses.replace(problem, logits=poisoned, arguments=arguments)
    for operation in (fused_loss, reference.step_weighted_kl):
        result, gradient = solve(operation, marked)
        for name in ("token_loss", "logprobs", "entropy", "ratio", "topk_logprobs"):
            assert (getattr(result, name)[[1, 3]] == 0).all()
        assert (gradient[[1, 3]] == 0).all()
        torch.testing.assert_close(result.token_loss[[0, 2, 4]], whole.token_loss[[0, 2, 4]])
        torch.testing.assert_close(
            gradient[[0, 2, 4]], whole_gradient[[0, 2, 4]], rtol=1e-4, atol=1e-6
        )


def test_gradient_may_take_the_place_of_the_logits() -> None:
    problem = make_problem(EVERYTHING)
    _, expected = solve(fused_loss, problem)
    logits = problem.logits.clone().requires_grad_() * 1
    result = apply(fused_loss, problem, logits, overwrite_logits=True)
    loss = (result.token_loss * problem.upstream).sum()
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="differentiated twice with overwrite_logits=True"):
        loss.backward()


def test_gradient_of_logprobs_may_take_the_place_of_the_logits() -> None:
    problem = make_problem(Objective())
    targets = problem.arguments["targets"]
    leaf = problem.logits.clone().requires_grad_()
    logprobs, _ = fused_logprobs(leaf, targets, vocab_size=problem.vocab_size)
    (expected,) = torch.autograd.grad(logprobs.sum(), leaf)
    logits = leaf * 1
    logprobs, _ = fused_logprobs(
        logits, targets, vocab_size=problem.vocab_size, overwrite_logits=True
    )
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="differentiated twice with overwrite_logits=True"):
        logprobs.sum().backward()


def test_another_use_of_overwritten_logits_is_noticed() -> None:
    problem = make_problem(Objective())
    logits = torch.nan_to_num(problem.logits).requires_grad_() * 1
    square = logits.square().sum()
    result = apply(fused_loss, problem, logits, overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (result.token_loss.sum() + square).backward()


def test_without_leave_the_logits_stay_as_they_are() -> None:
    problem = make_problem(EVERYTHING)
    before = problem.logits.clone()
    logits = problem.logits.requires_grad_()
    for _ in range(2):
        result = apply(fused_loss, problem, logits)
        result.token_loss.sum().backward()
    assert torch.equal(logits.detach().nan_to_num(), before.nan_to_num())


def test_rows_may_lie_apart() -> None:
    problem = make_problem(EVERYTHING)
    expected, expected_gradient = solve(fused_loss, problem)
    wide = torch.full((5, 2048), math.nan)
    wide[:, 3 : 3 + problem.logits.shape[1]] = problem.logits
    logits = wide[:, 3 : 3 + problem.logits.shape[1]].requires_grad_()
    result = apply(fused_loss, problem, logits)
    assert torch.equal(result.token_loss, expected.token_loss)
    (result.token_loss * problem.upstream).sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, expected_gradient)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_same_bits_twice_and_on_any_number_of_threads(num_threads: int) -> None:
    problem = make_problem(EVERYTHING, num_rows=40, vocab_size=30_000, top_k=64)
    expected, expected_gradient = solve(fused_loss, problem)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for _ in range(2):
            result, gradient = solve(fused_loss, problem)
            assert torch.equal(result.token_loss, expected.token_loss)
            assert torch.equal(gradient, expected_gradient)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0x7F800001])
def test_nan_is_passed_on_within_its_row(bits: int) -> None:
    problem = make_problem(Objective())
    problem.logits[2, 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    result, gradient = solve(fused_loss, problem)
    for name in ("token_loss", "logprobs", "entropy", "ratio"):
        values = getattr(result, name)
        assert values.isnan().tolist() == [False, False, True, False, False], name
    assert gradient[2].isnan().any()
    assert gradient[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("token_weights", ["k2", "k3", "topk_reverse_kl"]),
        ("advantages", ["policy"]),
        ("old_logprobs", ["policy"]),
        ("teacher_logprobs", ["k2", "k3"]),
    ],
)
def test_nan_of_an_input_shows_in_its_terms(name: str, terms: list[str]) -> None:
    problem = make_problem(EVERYTHING)
    problem.arguments[name][3] = math.nan
    result, _ = solve(fused_loss, problem)
    expected, _ = solve(reference.step_weighted_kl, problem)
    assert [name for name, values in result.terms.items() if values[3].isnan()] == terms
    for values in (result.token_loss, expected.token_loss):
        assert values.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_and_entropies(dtype: torch.dtype, temperature: float) -> None:
    problem = make_problem(Objective(), dtype=dtype, num_rows=6)
    gradients, values = [], []
    for operation, logits in (
        (fused_logprobs, problem.logits),
        (reference.vocab_parallel_logprobs, problem.logits.double()),
    ):
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = operation(
            leaf,
            problem.arguments["targets"],
            vocab_size=problem.vocab_size,
            temperature=temperature,
        )
        (logprobs * torch.linspace(-1, 2, 6) - 0.3 * entropy).sum().backward()
        assert leaf.grad is not None
        values.append((logprobs, entropy))
        gradients.append(leaf.grad)
    for ours, theirs in zip(*values, strict=True):
        assert value_error(ours.detach(), theirs.detach()) <= TOLERANCE
    tolerance = TOLERANCE if dtype == torch.float32 else 4e-3
    assert relative_error(gradients[0], gradients[1]) <= tolerance


def test_logprob_alone_has_a_gradient() -> None:
    problem = make_problem(Objective())
    leaf = problem.logits.clone().requires_grad_()
    logprobs, entropy = fused_logprobs(
        leaf, problem.arguments["targets"], vocab_size=problem.vocab_size
    )
    (only,) = torch.autograd.grad(logprobs.sum(), leaf, retain_graph=True)
    (both,) = torch.autograd.grad(logprobs.sum() + 0.0 * entropy.sum(), leaf)
    assert torch.equal(only, both)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    num_rows=st.integers(1, 6),
    vocab_size=st.integers(2, 3000),
    padding=st.integers(0, 70),
    top_k=st.sampled_from([0, 1, 2, 7]),
    temperature=st.floats(0.3, 3.0),
    divergence=st.sampled_from(["forward_kl", "reverse_kl", "jsd"]),
    coefficients=st.tuples(*[st.sampled_from([0.0, 0.5]) for _ in range(4)]),
)
def test_fused_and_reference_agree(
    seed: int,
    num_rows: int,
    vocab_size: int,
    padding: int,
    top_k: int,
    temperature: float,
    divergence: Any,
    coefficients: tuple[float, float, float, float],
) -> None:
    k2, k3, topk, entropy = coefficients
    objective = Objective(
        k2_coefficient=k2,
        k3_coefficient=k3,
        topk_coefficient=topk,
        topk_divergence=divergence,
        entropy_coefficient=entropy,
    )
    problem = make_problem(
        objective,
        num_rows=max(num_rows, 3),
        vocab_size=vocab_size,
        padding=padding,
        top_k=min(top_k, vocab_size),
        temperature=temperature,
        seed=seed,
    )
    expected, expected_gradient = solve_in_float64(problem)
    result, gradient = solve(fused_loss, problem)
    assert value_error(result.token_loss, expected.token_loss) <= TOLERANCE
    # Float32 statistics know 1 - p of a token to 1e-7 only, which is much of a gradient where p is
    # near 1; so does eager torch in float32.
    allowed = TOLERANCE * expected_gradient.norm() + 1e-6 * len(gradient) ** 0.5 / temperature
    assert (gradient.double() - expected_gradient).norm() <= allowed


def test_arguments_are_checked_as_by_the_reference() -> None:
    problem = make_problem(EVERYTHING)
    problem.arguments["advantages"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"advantages has shape \(4,\)"):
        solve(fused_loss, problem)
    with pytest.raises(ValueError, match="its rows overlap"):
        fused_logprobs(torch.zeros(8).expand(4, 8), torch.zeros(4, dtype=torch.long), vocab_size=8)
    with pytest.raises(ValueError, match=r"logits has dtype torch\.float64"):
        fused_logprobs(torch.zeros(4, 8).double(), torch.zeros(4).long(), vocab_size=8)
    leaf = torch.zeros(4, 2, 8).requires_grad_()
    for logits in (torch.zeros(4, 8).requires_grad_(), leaf[:, 0], leaf.view(8, 8)):
        targets = torch.zeros(len(logits)).long()
        with pytest.raises(ValueError, match="logits is a leaf, or a view of one"):
            fused_logprobs(logits, targets, vocab_size=8, overwrite_logits=True)
    problem.arguments["advantages"] = 1.0
    with pytest.raises(TypeError, match="advantages is a float; it must be a tensor"):
        solve(fused_loss, problem)
    with pytest.raises(ValueError, match="must lie side by side"):
        fused_logprobs(torch.zeros(8, 4).T, torch.zeros(4, dtype=torch.long), vocab_size=8)


@pytest.mark.parametrize("choice", ["auto", "fused", "eager"])
def test_the_environment_chooses(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOD_OPS", choice)
    problem = make_problem(EVERYTHING)
    result, gradient = solve(ops.step_weighted_kl, problem)
    expected, expected_gradient = solve(
        reference.step_weighted_kl if choice == "eager" else fused_loss, problem
    )
    assert torch.equal(result.token_loss, expected.token_loss)
    assert torch.equal(gradient, expected_gradient)
