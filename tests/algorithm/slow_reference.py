"""The method token by token in Python floats, written from the paper's equations as they stand:
runs found by a scan, weights by a running product. Independent of the vectorised code under test.
"""

import math


def step_spans(mask: list[bool]) -> list[tuple[int, int]]:
    """Maximal runs of the mask as half-open spans."""
    spans = []
    start = None
    for position, inside in enumerate([*mask, False]):
        if inside and start is None:
            start = position
        if not inside and start is not None:
            spans.append((start, position))
            start = None
    return spans


def turn_positions(mask: list[bool], turns: list[int]) -> list[list[int]]:
    """Mask-1 positions of each turn that has any."""
    positions: dict[int, list[int]] = {}
    for position, inside in enumerate(mask):
        if inside:
            positions.setdefault(turns[position], []).append(position)
    return [positions[turn] for turn in sorted(positions)]


def step_weights(
    student: list[float],
    teacher: list[float],
    steps: list[list[int]],
    *,
    epsilon: float = 1e-6,
    delta: float = 0.2,
) -> tuple[list[float], list[float]]:
    """``(d_k, w_k)`` of the steps, by the product of Eq. 7."""
    divergence = [
        math.fsum(abs(student[t] - teacher[t]) for t in step) / len(step) for step in steps
    ]
    weights = []
    product = 1.0
    for k in range(len(steps)):
        if k > 0:
            product *= (divergence[k - 1] + epsilon) / (divergence[k] + epsilon)
        weights.append(1.0 if k == 0 else min(product, 1.0 + delta))
    return divergence, weights


def clipped_loss(
    new: float, old: float, advantage: float, low: float, high: float, dual: float
) -> float:
    """The dual-clipped surrogate of one token."""
    ratio = math.exp(new - old)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
    return min(loss, -advantage * dual) if advantage < 0 else loss


def bucket_divergence(p: list[float], q: list[float], name: str, beta: float) -> float:
    """Divergence of two distributions over buckets, all of ``q`` positive."""
    if name == "forward_kl":
        return math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    if name == "reverse_kl":
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    mixture = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
    return beta * bucket_divergence(mixture, q, "forward_kl", beta) + (
        1 - beta
    ) * bucket_divergence(mixture, p, "forward_kl", beta)
