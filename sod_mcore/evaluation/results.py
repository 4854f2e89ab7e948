"""What the samples of an evaluation say: one result for each data set and each source in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sod_mcore.evaluation.data_sets import DataSet
from sod_mcore.evaluation.samples import Sample
from sod_mcore.evaluation.statistics import (
    Estimate,
    best_at_bootstrap,
    majority_at_bootstrap,
    majority_at_n,
    mean_estimate,
    pass_at_k,
    pass_sizes,
)

_Group = list[Sample]
"""The samples of one problem and seed."""


@dataclass(frozen=True)
class Result:
    """Numbers about one data set, or about one source of its rows.

    A problem's value is the mean of its seeds' values, the result's is the mean of the problems',
    with its standard error over problems. Problems without a sample, and for pass@k with fewer than
    k, are in no mean; ``dropped`` tells how many samples there should be more.

    Attributes:
        data_set: name of the benchmark file.
        data_source: source of the rows; empty for all rows of the file.
        problems: problems asked.
        seeds: repetitions.
        samples: n, samples asked of each problem and seed.
        dropped: samples that infrastructure lost and that were not drawn again yet.
        average: average@n, share of right samples.
        seed_error: standard error of average@n over seeds; NaN for one seed.
        pass_at: pass@k by k, unbiased.
        majority: maj@n.
        best_bootstrap: the reference's best@k by k.
        majority_bootstrap: the reference's maj@n.
        tool_calls: mean a sample.
        failed_calls: share of calls that failed.
        response_tokens: mean a sample.
        truncated: share of samples that reached the token limit.
        no_answer: share of samples in which the verifier found no answer.
    """

    data_set: str
    data_source: str
    problems: int
    seeds: int
    samples: int
    dropped: int
    average: Estimate
    seed_error: float
    pass_at: dict[int, Estimate]
    majority: Estimate
    best_bootstrap: dict[int, Estimate]
    majority_bootstrap: Estimate
    tool_calls: float
    failed_calls: float
    response_tokens: float
    truncated: float
    no_answer: float


def summarise_samples(
    data_sets: Sequence[DataSet], seeds: Sequence[int], samples: int, kept: Iterable[Sample]
) -> list[Result]:
    """The results of every data set; of each source too where a file has several."""
    groups: dict[str, dict[int, _Group]] = {}
    for sample in kept:
        if sample.seed in seeds and sample.index < samples:
            groups.setdefault(sample.prompt_id, {}).setdefault(sample.seed, []).append(sample)
    results = []
    for data_set in data_sets:
        sources = sorted({prompt.data_source for prompt in data_set.prompts})
        for source in ["", *(sources if len(sources) > 1 else [])]:
            prompts = [p for p in data_set.prompts if not source or p.data_source == source]
            problems = [groups.get(prompt.prompt_id, {}) for prompt in prompts]
            results.append(_summarise(data_set.name, source, problems, seeds, samples))
    return results


def _summarise(
    data_set: str,
    source: str,
    problems: Sequence[dict[int, _Group]],
    seeds: Sequence[int],
    samples: int,
) -> Result:
    drawn = [sample for by_seed in problems for group in by_seed.values() for sample in group]
    calls = sum(sample.tool_calls for sample in drawn)

    def mean(statistic: Callable[[_Group], float], at_least: int = 1) -> Estimate:
        return _over_problems(problems, statistic, at_least)

    return Result(
        data_set=data_set,
        data_source=source,
        problems=len(problems),
        seeds=len(seeds),
        samples=samples,
        dropped=len(problems) * len(seeds) * samples - len(drawn),
        average=mean(_accuracy),
        seed_error=_seed_error(problems, seeds),
        pass_at={k: mean(partial(_pass_at, k=k), at_least=k) for k in pass_sizes(samples)},
        majority=mean(_majority),
        best_bootstrap={k: mean(partial(_best_bootstrap, k=k)) for k in pass_sizes(samples)},
        majority_bootstrap=mean(partial(_majority_bootstrap, k=samples)),
        tool_calls=_mean([sample.tool_calls for sample in drawn]),
        failed_calls=sum(s.failed_calls for s in drawn) / calls if calls else 0.0,
        response_tokens=_mean([sample.response_tokens for sample in drawn]),
        truncated=_mean([sample.end_reason == "length" for sample in drawn]),
        no_answer=_mean([not sample.prediction.strip() for sample in drawn]),
    )


def _over_problems(
    problems: Sequence[dict[int, _Group]], statistic: Callable[[_Group], float], at_least: int
) -> Estimate:
    """Mean over problems of the mean over their seeds, of groups of ``at_least`` samples."""
    values = [
        [statistic(group) for group in by_seed.values() if len(group) >= at_least]
        for by_seed in problems
    ]
    return mean_estimate([_mean(of_seeds) for of_seeds in values if of_seeds])


def _seed_error(problems: Sequence[dict[int, _Group]], seeds: Sequence[int]) -> float:
    """Standard error of average@n over seeds."""
    averages = [
        _mean([_accuracy(by_seed[seed]) for by_seed in problems if seed in by_seed])
        for seed in seeds
    ]
    return mean_estimate(averages).standard_error


def _accuracy(group: _Group) -> float:
    return float(_correct(group).mean())


def _pass_at(group: _Group, k: int) -> float:
    return pass_at_k(len(group), int(_correct(group).sum()), k)


def _majority(group: _Group) -> float:
    return majority_at_n(_predictions(group), _correct(group))


def _best_bootstrap(group: _Group, k: int) -> float:
    return best_at_bootstrap(_correct(group), k)


def _majority_bootstrap(group: _Group, k: int) -> float:
    return majority_at_bootstrap(_predictions(group), _correct(group), k)


def _correct(group: _Group) -> NDArray[np.bool_]:
    return np.array([sample.is_correct for sample in group], dtype=bool)


def _predictions(group: _Group) -> list[str]:
    return [sample.prediction for sample in group]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
