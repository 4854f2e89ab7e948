"""Average accuracy on a prompt set, by temperature, through the rollout pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sod_mcore.config import EvaluationConfig, RolloutConfig
from sod_mcore.evaluation.statistics import Outcomes, average_at_n, pass_at
from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.pool import RolloutInterruptedError, RolloutPool, check_losses
from sod_mcore.rollout.request import RolloutRequest
from sod_mcore.trajectory import Prompt, Trajectory


@dataclass(frozen=True)
class EvaluationResult:
    """Results at one temperature.

    Attributes:
        temperature: 0 is greedy.
        accuracy: share of right trajectories (average@n for n samples a prompt).
        accuracy_by_source: the same for each data source.
        failed_call_share: share of trajectories with at least one failed tool call.
        failed_calls: share of tool calls that failed; 0 without any.
        tool_calls: mean tool calls a trajectory.
        num_trajectories: trajectories behind these numbers.
        num_dropped: trajectories lost to infrastructure.
        repeated: where problems have several samples, what these tell: "standard_error", of the
            accuracy over problems, and "pass_at_<n>", unbiased.
    """

    temperature: float
    accuracy: float
    accuracy_by_source: dict[str, float]
    failed_call_share: float
    failed_calls: float
    tool_calls: float
    num_trajectories: int
    num_dropped: int
    repeated: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat metrics, named after the temperature."""
        prefix = f"evaluation/temperature_{self.temperature:g}"
        return {
            f"{prefix}/accuracy": self.accuracy,
            f"{prefix}/failed_call_share": self.failed_call_share,
            f"{prefix}/failed_calls": self.failed_calls,
            f"{prefix}/tool_calls": self.tool_calls,
            f"{prefix}/num_trajectories": float(self.num_trajectories),
            f"{prefix}/num_dropped": float(self.num_dropped),
            **{f"{prefix}/{name}": value for name, value in self.repeated.items()},
            **{
                f"{prefix}/accuracy/{source}": accuracy
                for source, accuracy in self.accuracy_by_source.items()
            },
        }


def evaluate_temperature(
    pool: RolloutPool,
    prompts: Sequence[Prompt],
    temperature: float,
    evaluation: EvaluationConfig,
    rollout: RolloutConfig,
    *,
    tools_enabled: bool = True,
    weight_version: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvaluationResult:
    """Sample and check every prompt at one temperature.

    Greedy decoding takes one sample a prompt, whatever ``evaluation.samples`` says.

    Args:
        weight_version: the oldest weights that may sample; None takes any.

    Raises:
        RolloutError: the pool failed, missed ``rollout.deadline_seconds`` or dropped too much.
        RolloutInterruptedError: ``should_stop`` became true first.
    """
    request = RolloutRequest(
        prompts=tuple(prompts),
        samples_per_prompt=evaluation.samples if temperature > 0 else 1,
        sampling=Sampling(temperature, evaluation.top_p),
        with_teacher=False,
        tools_enabled=tools_enabled,
        weight_version=weight_version,
        is_urgent=True,
    )
    ticket = pool.submit(request)
    try:
        batch = pool.collect(ticket, rollout.deadline_seconds, should_stop=should_stop)
    except RolloutInterruptedError:
        pool.cancel(ticket)
        raise
    check_losses(batch, request, rollout)
    return summarise(batch.trajectories, temperature, batch.num_dropped)


def summarise(
    trajectories: Sequence[Trajectory], temperature: float, num_dropped: int
) -> EvaluationResult:
    """Accuracy and tool use of finished trajectories."""
    sources = sorted({t.data_source for t in trajectories})
    return EvaluationResult(
        temperature=temperature,
        accuracy=_mean([t.is_correct for t in trajectories]),
        accuracy_by_source={
            source: _mean([t.is_correct for t in trajectories if t.data_source == source])
            for source in sources
        },
        failed_call_share=_mean([not all(t.tool_succeeded) for t in trajectories]),
        failed_calls=_mean([not success for t in trajectories for success in t.tool_succeeded]),
        tool_calls=_mean([len(t.tool_succeeded) for t in trajectories]),
        num_trajectories=len(trajectories),
        num_dropped=num_dropped,
        repeated=_repeated(trajectories),
    )


def _repeated(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Nothing for one sample a problem; pass@n is over the problems of which no sample is lost."""
    groups: dict[str, list[bool]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group_id, []).append(trajectory.is_correct)
    outcomes: Outcomes = [np.array(group, dtype=bool) for group in groups.values()]
    samples = max((group.size for group in outcomes), default=0)
    if samples < 2:
        return {}
    repeated = {f"pass_at_{samples}": pass_at(outcomes, samples).value}
    if len(outcomes) > 1:
        repeated["standard_error"] = average_at_n(outcomes).standard_error
    return repeated


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
