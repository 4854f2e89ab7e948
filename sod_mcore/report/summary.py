"""Numbers about a batch of trajectories as a whole, before anything is trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sod_mcore.trajectory import RecordedBatch, Trajectory


def summarise_rollout(batch: RecordedBatch, *, with_teacher: bool = True) -> dict[str, float]:
    """Flat metrics of one rollout batch.

    Args:
        batch: its trajectories may be none.
        with_teacher: whether the teacher was asked to score them.

    Returns:
        Means over trajectories unless the name says otherwise. Lengths are tokens; a response is
        all after the prompt, observations included. ``reward/std`` is the population's.
        ``reward/category/<category>`` is the share of a verdict. ``rollout/retries`` counts
        attempts at a trajectory beyond the first.
        ``rollout/failed_call_share`` is the share of trajectories with at least one failed call,
        ``rollout/failed_calls`` the share of calls that failed. ``rollout/staleness`` is a mean
        over sampled tokens: the versions by which the weights that sampled them are behind those
        that are trained; ``rollout/mixed_versions`` is the share of trajectories that more than one
        version sampled. Without trajectories only the counts are there.
    """
    trajectories = batch.trajectories
    metrics: dict[str, float] = {
        "rollout/trajectories": float(len(trajectories)),
        "rollout/dropped": float(batch.num_dropped),
        "rollout/retries": float(batch.num_retries),
    }
    if with_teacher:
        metrics["rollout/unscored"] = float(sum(not t.is_scored for t in trajectories))
    if not trajectories:
        return metrics
    for part in (_rewards, _tools, _lengths):
        metrics |= part(trajectories)
    return metrics | _staleness(batch)


def _rewards(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    rewards = np.array([t.reward for t in trajectories])
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/solved": _mean([t.is_correct for t in trajectories]),
    }
    for source in sorted({t.data_source for t in trajectories}):
        of_source = [t.is_correct for t in trajectories if t.data_source == source]
        metrics[f"reward/solved/{source or 'unnamed'}"] = _mean(of_source)
    for category, count in sorted(Counter(t.category for t in trajectories).items()):
        metrics[f"reward/category/{category or 'unknown'}"] = count / len(trajectories)
    for part in sorted({name for t in trajectories for name in t.reward_parts}):
        values = [t.reward_parts[part] for t in trajectories if part in t.reward_parts]
        metrics[f"reward/part/{part}"] = _mean(values)
    return metrics


def _tools(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    calls = [succeeded for t in trajectories for succeeded in t.tool_succeeded]
    metrics = {
        "rollout/tool_calls": len(calls) / len(trajectories),
        "rollout/failed_call_share": _mean([not all(t.tool_succeeded) for t in trajectories]),
    }
    if calls:
        metrics["rollout/failed_calls"] = _mean([not succeeded for succeeded in calls])
    return metrics


def _lengths(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    responses = [len(t) - t.prompt_length for t in trajectories]
    turns = [t.num_turns for t in trajectories]
    metrics = {
        "rollout/prompt_tokens": _mean([t.prompt_length for t in trajectories]),
        "rollout/response_tokens": _mean(responses),
        "rollout/response_tokens_max": float(max(responses)),
        "rollout/sampled_tokens": _mean([int(t.loss_mask.sum()) for t in trajectories]),
        "rollout/turns": _mean(turns),
        "rollout/turns_max": float(max(turns)),
    }
    for reason, count in sorted(Counter(t.end_reason for t in trajectories).items()):
        metrics[f"rollout/end/{reason}"] = count / len(trajectories)
    return metrics


def _staleness(batch: RecordedBatch) -> dict[str, float]:
    staleness = batch.staleness
    versions = [np.unique(t.weight_version[t.loss_mask]) for t in batch.trajectories]
    return {
        "rollout/staleness": float(staleness.mean()) if staleness.size else 0.0,
        "rollout/staleness_max": float(staleness.max(initial=0)),
        "rollout/mixed_versions": _mean([len(found) > 1 for found in versions]),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
