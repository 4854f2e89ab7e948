"""Samples survive whatever ends an evaluation, and only those that are missing are drawn again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.config import BenchmarkConfig, ConfigError, RolloutConfig
from sod_mcore.evaluation.data_sets import DataSet
from sod_mcore.evaluation.runner import Runner, plan_chunks
from sod_mcore.evaluation.samples import (
    SAMPLES_FILE,
    Sample,
    SampleStore,
    Settings,
    read_samples,
)
from sod_mcore.rollout.pool import RolloutError, RolloutInterruptedError
from tests.evaluation.fakes import FakePool, SlowPool, data_set

CHUNK = 8
"""Samples of a chunk."""
SETTINGS = {"evaluation.temperature": 1.0, "fingerprint of aime in evaluation.data": "abc"}


def benchmark(folder: Path, **changes: Any) -> BenchmarkConfig:
    settings: dict[str, Any] = {"samples": 4, **changes}
    return BenchmarkConfig(data="aime.parquet", output=str(folder), **settings)


def evaluate(
    config: BenchmarkConfig,
    data_sets: Sequence[DataSet],
    pools: Sequence[FakePool],
    rollout: RolloutConfig | None = None,
    settings: Settings = SETTINGS,
) -> list[Sample]:
    """Draw what is missing; returns what was kept by this call."""
    kept: list[Sample] = []
    rollout = rollout or RolloutConfig(max_dropped_fraction=1.0)
    with SampleStore(Path(config.output), settings) as store:
        chunks = plan_chunks(data_sets, config, store, CHUNK)
        Runner(data_sets, config, rollout, store).run(pools, chunks, kept.extend)
    return kept


def on_disk(folder: Path) -> list[tuple[int, str, int]]:
    samples = read_samples(folder / SAMPLES_FILE)
    return sorted((s.seed, s.prompt_id, s.index) for s in samples)


def all_of(name: str, problems: int, samples: int, seeds: Sequence[int] = (1,)) -> Any:
    return sorted(
        (seed, f"{name}/{problem}", index)
        for seed in seeds
        for problem in range(problems)
        for index in range(samples)
    )


def test_every_problem_gets_its_samples_in_chunks(tmp_path: Path) -> None:
    pools = [FakePool(), FakePool()]
    evaluate(benchmark(tmp_path, seeds=(1, 7)), [data_set("aime", 5)], pools)
    assert on_disk(tmp_path) == all_of("aime", 5, 4, seeds=(1, 7))
    requests = [request for pool in pools for request in pool.requests]
    assert sorted(request.num_trajectories for request in requests) == [4, 4, 8, 8, 8, 8]
    assert all(pool.requests for pool in pools)


def test_nothing_is_drawn_twice(tmp_path: Path) -> None:
    config = benchmark(tmp_path)
    evaluate(config, [data_set("aime", 3)], [FakePool()])
    assert evaluate(config, [data_set("aime", 3)], [FakePool()]) == []
    assert on_disk(tmp_path) == all_of("aime", 3, 4)


def test_a_dead_pool_costs_only_its_chunk(tmp_path: Path) -> None:
    config = benchmark(tmp_path)
    with pytest.raises(RolloutError, match="exit code -9"):
        evaluate(config, [data_set("aime", 6)], [FakePool(dies_after=1)])
    assert len(on_disk(tmp_path)) == 8
    kept = evaluate(config, [data_set("aime", 6)], [FakePool()])
    assert len(kept) == 16
    assert on_disk(tmp_path) == all_of("aime", 6, 4)


def test_more_samples_seeds_and_data_sets_add_to_what_is_there(tmp_path: Path) -> None:
    evaluate(benchmark(tmp_path, samples=2), [data_set("aime", 3)], [FakePool()])
    pool = FakePool()
    both = [data_set("aime", 3), data_set("gpqa", 2)]
    kept = evaluate(benchmark(tmp_path, samples=3, seeds=(1, 2)), both, [pool])
    assert len(kept) == 3 * 3 * 2 - 3 * 2 + 2 * 3 * 2
    seeds = (1, 2)
    assert on_disk(tmp_path) == sorted([*all_of("aime", 3, 3, seeds), *all_of("gpqa", 2, 3, seeds)])
    assert {request.samples_per_prompt for request in pool.requests} == {1, 3}


def test_lost_samples_are_drawn_again(tmp_path: Path) -> None:
    config = benchmark(tmp_path)
    evaluate(config, [data_set("aime", 3)], [FakePool(drops=["aime/1"])])
    assert len(on_disk(tmp_path)) == 11
    (again,) = evaluate(config, [data_set("aime", 3)], [FakePool()])
    assert (again.prompt_id, again.index) == ("aime/1", 3)


def test_too_many_lost_samples_end_it_and_the_others_are_kept(tmp_path: Path) -> None:
    strict = RolloutConfig(max_dropped_fraction=0.05)
    with pytest.raises(RolloutError, match=r"1 of 8 samples lost.*the sandbox is gone"):
        evaluate(benchmark(tmp_path), [data_set("aime", 2)], [FakePool(drops=["aime/0"])], strict)
    assert len(on_disk(tmp_path)) == 7


def test_a_sample_that_is_always_lost_does_not_block_the_others(tmp_path: Path) -> None:
    strict = RolloutConfig(max_dropped_fraction=0.05)
    for seeds in ((1,), (1, 2), (1, 2)):
        config = benchmark(tmp_path, seeds=seeds)
        lossy = FakePool(drops=["aime/1"])
        evaluate(config, [data_set("aime", 6)], [lossy, FakePool()], strict)
    assert len(on_disk(tmp_path)) >= 2 * 24 - 1


def test_a_pool_that_fails_ends_the_other_and_its_samples_are_kept(tmp_path: Path) -> None:
    slow = SlowPool()
    with pytest.raises(RolloutError, match="exit code -9"):
        evaluate(benchmark(tmp_path), [data_set("aime", 6)], [FakePool(dies_after=1), slow])
    assert slow.was_interrupted
    assert len(on_disk(tmp_path)) == 8


def test_a_request_to_stop_keeps_what_is_there(tmp_path: Path) -> None:
    config, sets = benchmark(tmp_path), [data_set("aime", 6)]
    kept: list[Sample] = []
    with SampleStore(tmp_path, SETTINGS) as store:
        runner = Runner(sets, config, RolloutConfig(), store)
        chunks = plan_chunks(sets, config, store, CHUNK)
        with pytest.raises(RolloutInterruptedError):
            runner.run([FakePool()], chunks, kept.extend, should_stop=lambda: bool(kept))
    assert 0 < len(on_disk(tmp_path)) < 24


def test_samples_under_way_are_told(tmp_path: Path) -> None:
    config, sets = benchmark(tmp_path, samples=2), [data_set("aime", 4)]
    heard: list[int] = []
    with SampleStore(tmp_path, SETTINGS) as store:
        runner = Runner(sets, config, RolloutConfig(), store)
        runner.run(
            [FakePool()], plan_chunks(sets, config, store, CHUNK), lambda kept: None, heard.append
        )
    assert heard == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_sample_tells_its_conversation(tmp_path: Path) -> None:
    evaluate(benchmark(tmp_path, samples=1), [data_set("aime", 1)], [FakePool()])
    (line,) = (tmp_path / SAMPLES_FILE).read_text().splitlines()
    assert json.loads(line) == {
        "data_set": "aime",
        "prompt_id": "aime/0",
        "data_source": "math",
        "seed": 1,
        "index": 0,
        "temperature": 1.0,
        "reward": 1.0,
        "is_correct": True,
        "category": "right",
        "prediction": "0",
        "turns": 1,
        "tool_calls": 2,
        "failed_calls": 1,
        "response_tokens": 2,
        "end_reason": "answer",
        "messages": [{"role": "assistant", "content": "0"}],
    }


def test_a_torn_last_line_is_drawn_again(tmp_path: Path) -> None:
    config = benchmark(tmp_path)
    evaluate(config, [data_set("aime", 3)], [FakePool()])
    file = tmp_path / SAMPLES_FILE
    file.write_bytes(file.read_bytes()[:-20])
    (again,) = evaluate(config, [data_set("aime", 3)], [FakePool()])
    assert (again.prompt_id, again.index) == ("aime/2", 3)
    assert on_disk(tmp_path) == all_of("aime", 3, 4)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    evaluate(benchmark(tmp_path), [data_set("aime", 3)], [FakePool()])
    file = tmp_path / SAMPLES_FILE
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], "{}\n", *lines[2:]]))
    with pytest.raises(ConfigError, match="line 2 is not a sample"):
        SampleStore(tmp_path, SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_are_refused(tmp_path: Path, name: str) -> None:
    evaluate(benchmark(tmp_path), [data_set("aime", 1)], [FakePool()])
    with pytest.raises(ConfigError, match=f"{name} is 'other', but .* drawn with") as refused:
        SampleStore(tmp_path, {**SETTINGS, name: "other"})
    assert "\n" not in str(refused.value)
    SampleStore(tmp_path, SETTINGS).close()


def test_a_folder_without_samples_takes_other_settings(tmp_path: Path) -> None:
    SampleStore(tmp_path, SETTINGS).close()
    other = dict.fromkeys(SETTINGS, "other")
    SampleStore(tmp_path, other).close()
    evaluate(benchmark(tmp_path), [data_set("aime", 1)], [FakePool()], settings=other)
    with pytest.raises(ConfigError, match="drawn with 'other'"):
        SampleStore(tmp_path, SETTINGS)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with (
        SampleStore(tmp_path, SETTINGS),
        pytest.raises(ConfigError, match="where another evaluation runs"),
    ):
        SampleStore(tmp_path, SETTINGS)
