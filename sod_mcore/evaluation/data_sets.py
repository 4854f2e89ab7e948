"""Benchmark files as named sets of problems."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sod_mcore.config import BenchmarkConfig, ConfigError
from sod_mcore.data.prompts import read_prompts
from sod_mcore.trajectory import Prompt


@dataclass(frozen=True)
class DataSet:
    """The problems of one file.

    Attributes:
        name: short name of the file; every ``prompt_id`` begins with it.
        prompts: those that are used.
        digest: of all prompts of the file, ground truths included.
    """

    name: str
    prompts: tuple[Prompt, ...]
    digest: str


def read_data_sets(benchmark: BenchmarkConfig) -> list[DataSet]:
    """Read the benchmark files; of each, the first ``evaluation.max_prompts`` problems.

    Raises:
        ConfigError: there is no file, or two have the same name.
        DataError: a file cannot be read.
    """
    if not benchmark.data_files:
        raise ConfigError("evaluation.data is empty; give at least one benchmark file")
    data_sets = [_read_data_set(file, benchmark) for file in benchmark.data_files]
    name, count = Counter(data_set.name for data_set in data_sets).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"evaluation.data has {count} files named {name!r}; samples are kept by that name: "
            "rename all but one"
        )
    return data_sets


def sources_of(data_sets: Sequence[DataSet]) -> tuple[str, ...]:
    """Every ``data_source``, sorted."""
    return tuple(sorted({prompt.data_source for d in data_sets for prompt in d.prompts}))


def _read_data_set(file: str, benchmark: BenchmarkConfig) -> DataSet:
    prompts = read_prompts(
        file, instructions=benchmark.instructions, show_tests=benchmark.show_tests
    )
    name = prompts[0].prompt_id.rpartition("/")[0]
    return DataSet(name, tuple(prompts[: benchmark.max_prompts]), _digest(prompts))


def _digest(prompts: Sequence[Prompt]) -> str:
    text = json.dumps([dataclasses.asdict(prompt) for prompt in prompts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
