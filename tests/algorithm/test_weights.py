"""Step weights against hand-checked vectors and against the running product of Eq. 7."""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sod_mcore.algorithm import compute_step_weights
from sod_mcore.algorithm import weights as weights_module
from tests.algorithm import slow_reference

INF = math.inf
NAN = math.nan


def rows(*values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def weights_of(divergences: list[float]) -> list[float]:
    """Weights of a sample whose steps of one token have the given divergences."""
    student, teacher, mask = [], [], []
    for divergence in divergences:
        student += [-1.0, 5.0]
        teacher += [-1.0 - divergence, -9.0]
        mask += [1.0, 0.0]
    result = compute_step_weights(rows(student), rows(teacher), rows(mask))
    torch.testing.assert_close(result.step_divergence, rows(divergences), atol=1e-5, rtol=1e-5)
    return result.step_weights[0].tolist()


def test_one_step() -> None:
    result = compute_step_weights(rows([-1, -2, -0.5]), rows([-0.5, -2.5, -0.5]), rows([1, 1, 1]))
    assert result.token_weights.tolist() == [[1, 1, 1]]
    assert result.step_divergence.tolist() == [[pytest.approx(1 / 3, abs=1e-5)]]
    assert result.step_lengths.tolist() == [[3]]


STUDENT_V2 = [-0.5, -0.7, 0, -1, -1.4, 0, -0.3, -0.2]
TEACHER_V2 = [-0.3, -0.5, 0, -0.6, -1, 0, -0.2, -0.3]
MASK_V2 = [1, 1, 0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize(("delta", "third"), [(0.2, 1.2), (0.5, 1.5), (INF, 1.99999)])
def test_suppression_and_clip(delta: float, third: float) -> None:
    result = compute_step_weights(rows(STUDENT_V2), rows(TEACHER_V2), rows(MASK_V2), delta=delta)
    w = [1, 1, 0, 0.5, 0.5, 0, third, third]
    torch.testing.assert_close(result.token_weights, rows(w), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.step_divergence, rows([0.2, 0.4, 0.1]), atol=1e-5, rtol=0)
    assert result.step_index.tolist() == [[0, 0, -1, 1, 1, -1, 2, 2]]
    assert result.num_steps.tolist() == [3]
    assert result.token_weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("divergences", "expected"),
    [
        pytest.param([0.218, 1.284], [1, 0.169783], id="paper-case-B"),
        pytest.param([0.3, 0], [1, 1.2], id="later-step-agrees"),
        pytest.param([0, 0.5, 0], [1, 1.999996e-6, 1.0], id="first-step-agrees"),
        pytest.param([0.4, 0.1, 0.4], [1, 1.2, 1.0], id="clip-is-outside-the-product"),
        pytest.param([0.5, 0.1, 0.1, 0.25, 1.0], [1, 1.2, 1.2, 1.2, 0.5], id="saturation"),
        pytest.param([0.5, INF, 0.2], [1, 0, 1.2], id="infinite-step-mutes-itself-only"),
        pytest.param([INF, INF, 0.2], [1, 0, 1.2], id="infinite-first-step"),
    ],
)
def test_vectors(divergences: list[float], expected: list[float]) -> None:
    assert weights_of(divergences) == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_paper_case_b_is_the_ratio_to_six_digits() -> None:
    assert weights_of([0.218, 1.284])[1] == pytest.approx(0.169783, abs=1e-6)


def test_first_step_agrees_gives_a_tiny_but_exact_weight() -> None:
    assert weights_of([0, 0.5, 0])[1] == pytest.approx(1.999996e-6, rel=1e-5)


def test_no_sampled_token() -> None:
    result = compute_step_weights(rows([-1, -2]), rows([-2, -1]), rows([0, 0]))
    assert result.token_weights.tolist() == [[0, 0]]
    assert result.num_steps.tolist() == [0]
    assert result.step_weights.shape == (1, 0)


@pytest.mark.parametrize("garbage", [9.0, NAN, INF, -INF])
def test_what_lies_outside_the_mask_never_matters(garbage: float) -> None:
    student = rows([garbage, garbage, -0.4, -0.2, garbage, -1.2])
    teacher = rows([0, garbage, -0.2, -0.4, garbage, -0.4])
    result = compute_step_weights(student, teacher, rows([0, 0, 1, 1, 0, 1]))
    torch.testing.assert_close(result.step_divergence, rows([0.2, 0.8]), atol=1e-5, rtol=0)
    expected = rows([0, 0, 1, 1, 0, 0.25])
    torch.testing.assert_close(result.token_weights, expected, atol=1e-5, rtol=0)


def test_padding_columns_and_rows_change_nothing() -> None:
    plain = compute_step_weights(rows(STUDENT_V2), rows(TEACHER_V2), rows(MASK_V2))
    student = torch.full((3, 12), NAN)
    teacher = torch.full((3, 12), -INF)
    mask = torch.zeros(3, 12)
    student[1, 2:10], teacher[1, 2:10], mask[1, 2:10] = (
        rows(STUDENT_V2)[0],
        rows(TEACHER_V2)[0],
        rows(MASK_V2)[0],
    )
    padded = compute_step_weights(student, teacher, mask)
    assert torch.equal(padded.token_weights[1, 2:10], plain.token_weights[0])
    assert padded.token_weights.sum() == plain.token_weights.sum()
    assert torch.equal(padded.step_weights[1], plain.step_weights[0])
    assert padded.num_steps.tolist() == [0, 3, 0]


def test_past_the_last_step_there_is_nan_and_length_zero() -> None:
    mask = rows([1, 0, 1], [1, 1, 0])
    result = compute_step_weights(torch.zeros(2, 3), torch.zeros(2, 3) - 0.5, mask)
    assert result.step_divergence[1].isnan().tolist() == [False, True]
    assert result.step_weights[1].isnan().tolist() == [False, True]
    assert result.step_lengths.tolist() == [[1, 1], [2, 0]]


def test_long_steps_keep_their_digits() -> None:
    torch.manual_seed(0)
    student = -torch.rand(1, 200_000)
    teacher = student - 0.1 * torch.rand_like(student)
    result = compute_step_weights(student, teacher, torch.ones_like(student))
    expected = (student.double() - teacher.double()).abs().mean().float()
    assert result.step_divergence[0, 0] == expected


@pytest.mark.parametrize("bad", [NAN, INF])
def test_missing_teacher_scores_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"teacher_logprobs holds 1 unusable .* at \(0, 1\)"):
        compute_step_weights(rows([-1, -1]), rows([-1, bad]), rows([1, 1]))


@pytest.mark.parametrize(("name", "value"), [("epsilon", 0.0), ("epsilon", NAN), ("delta", -0.1)])
def test_constants_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        compute_step_weights(rows([-1]), rows([-1]), rows([1]), **{name: value})  # type: ignore[arg-type]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="teacher_logprobs has shape"):
        compute_step_weights(rows([-1, -1]), rows([-1]), rows([1, 1]))


LOGPROB = st.floats(-30, 0, width=32)


@st.composite
def batches(draw: st.DrawFn) -> list[list[tuple[float, float, bool, int]]]:
    """Samples of (student, teacher, mask, turn), turns never decreasing."""
    length = draw(st.integers(1, 24))
    samples = []
    for _ in range(draw(st.integers(1, 4))):
        turns = sorted(draw(st.lists(st.integers(0, 5), min_size=length, max_size=length)))
        samples.append([(draw(LOGPROB), draw(LOGPROB), draw(st.booleans()), t) for t in turns])
    return samples


@given(batches(), st.floats(0, 3), st.booleans())
@settings(max_examples=200, deadline=None)
def test_equals_the_running_product_token_by_token(
    samples: list[list[tuple[float, float, bool, int]]], delta: float, by_turn: bool
) -> None:
    student, teacher, mask, turn = (
        torch.tensor([[token[i] for token in sample] for sample in samples]) for i in range(4)
    )
    result = compute_step_weights(
        student, teacher, mask, turn_index=turn if by_turn else None, delta=delta
    )
    for row, sample in enumerate(samples):
        s, q, m, turns = (list(column) for column in zip(*sample, strict=True))
        steps = (
            slow_reference.turn_positions(m, turns)
            if by_turn
            else [list(range(*span)) for span in slow_reference.step_spans(m)]
        )
        divergence, weights = slow_reference.step_weights(s, q, steps, delta=delta)
        expected_tokens = [0.0] * len(sample)
        for step, weight in zip(steps, weights, strict=True):
            for position in step:
                expected_tokens[position] = weight
        count = len(steps)
        assert result.num_steps[row] == count
        assert result.step_lengths[row, :count].tolist() == [len(step) for step in steps]
        assert result.step_divergence[row, :count].tolist() == pytest.approx(divergence, rel=1e-5)
        assert result.step_weights[row, :count].tolist() == pytest.approx(weights, rel=1e-5)
        assert result.token_weights[row].tolist() == pytest.approx(expected_tokens, rel=1e-5)


@given(batches())
@settings(max_examples=50, deadline=None)
def test_weights_are_causal(samples: list[list[tuple[float, float, bool, int]]]) -> None:
    """The weight of a step does not depend on later ones."""
    student, teacher, mask = (
        torch.tensor([[token[i] for token in sample] for sample in samples]) for i in range(3)
    )
    result = compute_step_weights(student, teacher, mask)
    later = result.step_index > 0
    changed = compute_step_weights(student, torch.where(later, teacher - 1.0, teacher), mask)
    first = result.step_index == 0
    assert torch.equal(result.token_weights[first], changed.token_weights[first])
    cut = compute_step_weights(student, teacher, mask & (result.step_index <= 1))
    second = result.step_index == 1
    assert torch.equal(result.token_weights[second], cut.token_weights[second])


@pytest.mark.parametrize("with_turns", [False, True])
def test_samples_may_be_worked_off_in_blocks(
    with_turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large batches are; blocks differ in how many steps their samples have, and one has none."""
    generator = torch.Generator().manual_seed(0)
    student = -torch.rand(7, 40, generator=generator)
    teacher = student + torch.randn(7, 40, generator=generator)
    mask = torch.rand(7, 40, generator=generator) < torch.linspace(0, 0.9, 7)[:, None]
    turns = torch.arange(40).expand(7, 40) // 9 if with_turns else None
    whole = compute_step_weights(student, teacher, mask, turn_index=turns)
    monkeypatch.setattr(weights_module, "_BLOCK_VALUES", 80)
    blocks = compute_step_weights(student, teacher, mask, turn_index=turns)
    for field in dataclasses.fields(whole):
        ours, theirs = getattr(blocks, field.name), getattr(whole, field.name)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
