"""Accuracy over repeated samples: average@n, pass@k, maj@n, and how far each can be trusted.

Everything is for one data set and one seed unless the name says otherwise: ``correct`` has one
array a problem, its samples in the order in which they were drawn. Problems may have different
numbers of samples. The forms of the SOD reference (sod.md, section 8), which draw subsets with
replacement, are here under names of their own; they are biased low (one right sample of 32 gives
0.638 for 32 draws, where pass@32 is 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Outcomes = Sequence[NDArray[np.bool_]]
"""One boolean array a problem: which of its samples were right."""

BOOTSTRAP_DRAWS = 1000
BOOTSTRAP_SEED = 42


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error; NaN where a single observation cannot tell."""

    value: float
    standard_error: float


def mean_estimate(values: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """Mean and standard error s / sqrt(m) of m independent values, s with m - 1 in the divisor."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return Estimate(math.nan, math.nan)
    error = array.std(ddof=1) / math.sqrt(array.size) if array.size > 1 else math.nan
    return Estimate(float(array.mean()), float(error))


def average_at_n(correct: Outcomes) -> Estimate:
    """Mean over problems of the share of right samples, with the standard error over problems.

    Samples of one problem are not independent, so the problem is the unit (clustered standard
    errors, Miller 2024, arXiv 2411.00640, section 2.2, for clusters that weigh the same).
    """
    return mean_estimate([float(samples.mean()) for samples in correct if samples.size])


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that k samples hold a right one: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), equation 1.

    Raises:
        ValueError: ``k`` is not between 1 and ``num_samples``.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k}: pass@k of {num_samples} samples needs 1 <= k <= {num_samples}")
    wrong = num_samples - num_correct
    return 1.0 - math.comb(wrong, k) / math.comb(num_samples, k)


def pass_at(correct: Outcomes, k: int) -> Estimate:
    """pass@k, mean over the problems that have at least k samples."""
    return mean_estimate([pass_at_k(s.size, int(s.sum()), k) for s in correct if s.size >= k])


def pass_sizes(num_samples: int) -> tuple[int, ...]:
    """The k for which pass@k is told: the powers of two up to n, and n itself."""
    powers = [2**exponent for exponent in range(num_samples.bit_length())]
    return tuple(sorted({*powers, num_samples}))


def best_at_bootstrap(correct: NDArray[np.bool_], k: int) -> float:
    """The reference's best@k of one problem: mean over 1,000 draws, with replacement, of the
    largest of k samples. The generator is reset for each call, as there."""
    return float(correct[_draws(correct.size, k)].max(axis=1).mean())


def majority_at_n(predictions: Sequence[str], correct: NDArray[np.bool_]) -> float:
    """Whether the most frequent answer of one problem is right; a tie gives the mean over those
    that lead.

    Answers are equal if their texts are, but for surrounding white space: "1/2" and "0.5" vote
    apart. A sample without an answer has no vote, and without any vote the problem is not solved.
    """
    votes: dict[str, list[bool]] = {}
    for prediction, is_correct in zip(predictions, correct, strict=True):
        if answer := prediction.strip():
            votes.setdefault(answer, []).append(bool(is_correct))
    if not votes:
        return 0.0
    most = max(len(verdicts) for verdicts in votes.values())
    leading = [verdicts for verdicts in votes.values() if len(verdicts) == most]
    return float(np.mean([np.mean(verdicts) for verdicts in leading]))


def majority_at_bootstrap(predictions: Sequence[str], correct: NDArray[np.bool_], k: int) -> float:
    """The reference's maj@k of one problem: mean over 1,000 draws, with replacement, of whether the
    most frequent answer among k samples is right. Of tied answers the one drawn first wins, and no
    answer ("") is an answer like others."""
    names = {name: number for number, name in enumerate(dict.fromkeys(predictions))}
    answers = np.array([names[prediction] for prediction in predictions])
    return float(np.mean([_vote(answers[d], correct[d]) for d in _draws(correct.size, k)]))


def _vote(answers: NDArray[np.int64], correct: NDArray[np.bool_]) -> bool:
    """The verdict on the first sample with the most frequent answer; the first drawn wins ties."""
    counts = (answers[:, None] == answers[None, :]).sum(axis=1)
    return bool(correct[counts.argmax()])


def _draws(num_samples: int, k: int) -> NDArray[np.int64]:
    """Indices ``[draws, k]``, those that ``numpy.random.choice`` draws one after the other."""
    generator = np.random.RandomState(BOOTSTRAP_SEED)
    return generator.choice(num_samples, size=(BOOTSTRAP_DRAWS, k), replace=True)
