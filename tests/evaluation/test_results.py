"""What results say about samples whose numbers are known."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sod_mcore.evaluation.results import Result, summarise_samples
from sod_mcore.evaluation.samples import Sample, sample_of
from sod_mcore.evaluation.statistics import majority_at_bootstrap
from sod_mcore.evaluation.tables import json_lines, markdown, metrics
from tests.evaluation.fakes import answered, data_set

ANSWERS = {
    # Problem 0 has the answer 0, problem 1 the answer 1.
    1: {"aime/0": ["0", "0", "5", ""], "aime/1": ["1", "7", "7", "8"]},
    2: {"aime/0": ["0", "0", "0", "0"], "aime/1": ["7", "7", "7", "7"]},
}
SETTINGS: dict[str, Any] = {"model": "models/student", "temperature": 1.0}


def samples(answers: dict[int, dict[str, list[str]]]) -> Iterator[Sample]:
    prompts = {prompt.prompt_id: prompt for prompt in data_set("aime", 2).prompts}
    for seed, by_problem in answers.items():
        for prompt_id, texts in by_problem.items():
            for index, text in enumerate(texts):
                trajectory = answered(prompts[prompt_id], answer=text)
                yield sample_of(
                    trajectory, data_set="aime", seed=seed, index=index, temperature=1.0
                )


def result(seeds: tuple[int, ...] = (1, 2), n: int = 4) -> Result:
    (only,) = summarise_samples([data_set("aime", 2)], seeds, n, samples(ANSWERS))
    return only


def test_numbers_are_those_of_the_samples() -> None:
    both = result()
    # Per problem over the seeds: 3/4 and 1/8.
    assert both.average.value == pytest.approx(7 / 16)
    assert both.average.standard_error == pytest.approx((3 / 4 - 1 / 8) / 2)
    # Seed averages: 3/8 and 1/2.
    assert both.seed_error == pytest.approx((1 / 2 - 3 / 8) / 2)
    assert both.pass_at[1].value == pytest.approx(7 / 16)
    assert both.pass_at[4].value == pytest.approx((1 + 1 / 2) / 2)
    # pass@2 of 2, 1, 4 and 0 right of 4.
    assert both.pass_at[2].value == pytest.approx(((5 / 6 + 1) / 2 + (1 / 2 + 0) / 2) / 2)
    assert both.majority.value == pytest.approx(1 / 2)
    assert both.best_bootstrap[4].value < both.pass_at[4].value
    assert (both.tool_calls, both.failed_calls, both.response_tokens) == (2, 0.5, 2)
    assert both.no_answer == pytest.approx(1 / 16)
    assert (both.problems, both.seeds, both.samples, both.dropped) == (2, 2, 4, 0)


def test_majority_by_bootstrap_draws_as_many_as_there_are() -> None:
    """Of three right and one wrong answer, draws of four mostly have a right majority; one draw has
    it three times of four."""
    only_first = samples({1: {"aime/0": ["0", "0", "0", "5"], "aime/1": ["1"] * 4}})
    (both,) = summarise_samples([data_set("aime", 2)], [1], 4, only_first)
    right = np.array([True, True, True, False])
    expected = (majority_at_bootstrap(["0", "0", "0", "5"], right, 4) + 1) / 2
    assert both.majority_bootstrap.value == pytest.approx(expected)
    assert both.majority_bootstrap.value != pytest.approx((3 / 4 + 1) / 2, abs=0.02)


def test_samples_that_reached_the_limit_are_truncated() -> None:
    four = list(samples({1: {"aime/0": ["0"] * 4}}))
    four[2] = dataclasses.replace(four[2], end_reason="length")
    (only,) = summarise_samples([data_set("aime", 1)], [1], 4, four)
    assert only.truncated == pytest.approx(1 / 4)


def test_one_seed_has_no_error_over_seeds() -> None:
    one = result(seeds=(1,))
    assert one.average.value == pytest.approx(3 / 8)
    assert math.isnan(one.seed_error)


def test_fewer_samples_take_the_first() -> None:
    assert result(seeds=(1,), n=1).average.value == 1.0


def test_missing_samples_are_counted() -> None:
    answers = {1: {"aime/0": ["0", "0", "5"]}}
    (only,) = summarise_samples([data_set("aime", 2)], [1], 4, samples(answers))
    assert only.dropped == 5
    assert only.average.value == pytest.approx(2 / 3)
    assert only.pass_at[2].value == pytest.approx(1.0)
    assert math.isnan(only.pass_at[4].value)


def test_each_source_of_a_file_has_a_result_too() -> None:
    mixed = data_set("aime", 2, sources=("algebra", "geometry"))
    results = summarise_samples([mixed], [1], 4, samples(ANSWERS))
    assert [(r.data_source, r.problems) for r in results] == [
        ("", 2),
        ("algebra", 1),
        ("geometry", 1),
    ]
    assert [r.average.value for r in results] == pytest.approx([3 / 8, 1 / 2, 1 / 4])


def test_markdown_has_a_row_for_each_result() -> None:
    text = markdown([result()], SETTINGS)
    header, _, row = [line for line in text.splitlines() if line.startswith("|")][:3]
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["average@4"] == "43.8% ± 31.2"
    assert cells["over seeds"] == "± 6.2"
    assert cells["samples"] == "4 x 2"
    assert cells["pass@4"] == "75.0%"
    assert "model models/student" in text


def test_json_lines_have_null_for_what_is_not_known() -> None:
    (line,) = json_lines([result(seeds=(1,))], SETTINGS).splitlines()
    tree = json.loads(line)
    assert tree["seed_error"] is None
    assert tree["pass_at"]["4"]["value"] == 1.0
    assert tree["model"] == "models/student"


def test_metrics_are_named_after_the_data_set() -> None:
    flat = metrics([result(seeds=(1,))])
    assert flat["evaluation/aime/average_at_4"] == pytest.approx(3 / 8)
    assert flat["evaluation/aime/pass_at_4"] == 1.0
    assert "evaluation/aime/seed_standard_error" not in flat
