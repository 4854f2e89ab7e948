"""How far student and teacher disagree on a step, by what became of the step's tool call.

Step weights take disagreement for drift. These numbers show whether it is: a failed call on which
both agree keeps its weight, whatever it does to the steps behind it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

StepValues = tuple[Sequence[bool], NDArray[np.float32], NDArray[np.float32]]
"""Of one trajectory: whether each tool call succeeded, ``d_k`` ``[K]`` and ``w_k`` ``[K]``."""


def metrics_by_outcome(rows: Iterable[StepValues]) -> dict[str, float]:
    """Means over all steps of a kind: ``distillation/d_k/<kind>``, ``w_k``, and their number.

    Kinds: "call_succeeded", "call_failed", "no_call" (nearly always an answer; also a turn that was
    cut off, or whose call came too late), by the step's own call; and "after_failure", by whether
    the call just before it failed. Kinds without a step are left out.
    """
    divergence: dict[str, list[float]] = defaultdict(list)
    weights: dict[str, list[float]] = defaultdict(list)
    for succeeded, d, w in rows:
        for k in range(len(d)):
            for kind in _kinds(succeeded, k):
                divergence[kind].append(float(d[k]))
                weights[kind].append(float(w[k]))
    metrics = {}
    for kind, values in sorted(divergence.items()):
        metrics[f"distillation/d_k/{kind}"] = float(np.mean(values))
        metrics[f"distillation/w_k/{kind}"] = float(np.mean(weights[kind]))
        metrics[f"distillation/steps/{kind}"] = float(len(values))
    return metrics


def _kinds(succeeded: Sequence[bool], k: int) -> list[str]:
    calls = ["call_succeeded" if success else "call_failed" for success in succeeded]
    own = calls[k] if k < len(calls) else "no_call"
    follows_failure = 1 <= k <= len(calls) and calls[k - 1] == "call_failed"
    return [own, "after_failure"] if follows_failure else [own]
