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
    temperatures: tuple[float, ...] = (1.0, 0.0)
    """Sampling temperatures evaluated; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling in evaluation."""
    max_prompts: Positive | None = None
    """Prompts used during training; before and after, all of them are."""


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
