"""Settings of evaluation and of what a run tells."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sod_mcore.config.base import STRICT, NonNegative, Positive


@dataclass(config=STRICT, kw_only=True, frozen=True)
class EvaluationConfig:
    """Evaluation before, during and after training."""

    data: str | tuple[str, ...] | None = None
    """Evaluation prompts, one file or several, as data.train; null turns evaluation off."""
    every: NonNegative = 10
    """Steps between evaluations; 0 evaluates only before and after."""
    samples: Positive = 1
    """Samples of each prompt at temperature > 0."""
    temperatures: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (
        1.0,
        0.0,
    )
    """Sampling temperatures evaluated; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling in evaluation."""
    max_prompts: Positive | None = None
    """Prompts used of each file during training; before and after, all of them are."""

    @property
    def data_files(self) -> tuple[str, ...]:
        """The files (or names on the hub) of ``data``, however many."""
        if self.data is None:
            return ()
        return (self.data,) if isinstance(self.data, str) else self.data


@dataclass(config=STRICT, kw_only=True, frozen=True)
class BenchmarkConfig:
    """What ``python -m sod_mcore.evaluation`` measures; the defaults are the SOD paper's."""

    data: str | tuple[str, ...]
    """Benchmark files, one or several, as data.train."""
    output: str
    """Folder of samples, results and logs; the same folder again continues from its samples."""
    samples: Positive = 32
    """Samples of each problem and seed: the n of average@n."""
    seeds: tuple[int, ...] = (1,)
    """Names of the repetitions of all samples. Engines draw without a seed: the spread over seeds
    is that of repeated measurement, and a seed does not bring the same samples again."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Nucleus sampling."""
    max_prompt_tokens: Positive = 4096
    """Longest rendered prompt, tool schemas included; a longer one is refused."""
    max_prompts: Positive | None = None
    """Problems used of each file, from its beginning; null takes all."""
    instructions: Literal["published", "none"] = "published"
    """As data.instructions."""
    show_tests: bool = False
    """Print the test cases of LiveCodeBench_v6 in its prompts, as the reference does. Programs are
    scored by the same cases, so scores are then too high."""
    chunk_trajectories: Positive | None = None
    """Samples, at least, that are submitted and kept together; a crash loses those under way. null
    takes rollout.concurrency."""

    @property
    def data_files(self) -> tuple[str, ...]:
        """The files (or names on the hub) of ``data``, however many."""
        return (self.data,) if isinstance(self.data, str) else self.data


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ReportConfig:
    """Metrics, logs and tables."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases mode."""
    project: str = "sod_mcore"
    """Weights & Biases project."""
    name: str | None = None
    """Weights & Biases run name; null takes the run folder's."""
    trajectory_rows: NonNegative = 8
    """Sampled trajectories shown each step with d_k, w_k and token counts."""
    trace_every: NonNegative = 0
    """Steps of distillation between traces of a step's timeline, RUN/timeline/step_000012.json, for
    Perfetto; 0 writes none."""
