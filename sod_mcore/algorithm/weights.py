"""Step-wise distillation weights: how far the student has drifted in a step decides how much of the
teacher's signal that step gets (SOD, arXiv 2605.07725, Eq. 6 and 7).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sod_mcore.algorithm.finite import require_finite
from sod_mcore.algorithm.steps import index_steps

# On the CPU samples are worked off in blocks whose temporaries stay in the cache: four times faster
# than whole batches, most of whose time goes into touching new memory.
_BLOCK_VALUES = 1 << 18


@dataclass(frozen=True)
class StepWeights:
    """Weights per token and per step; K is the largest number of steps of a sample."""

    token_weights: Tensor  # [B, T] w_k of the token's step, 0 where the mask is 0
    step_index: Tensor  # [B, T] int64, 0-based, -1 where the mask is 0
    step_divergence: Tensor  # [B, K] d_k in nats, NaN past the last step
    step_weights: Tensor  # [B, K] w_k, NaN past the last step
    step_lengths: Tensor  # [B, K] int64 mask-1 tokens of the step, 0 past the last step
    num_steps: Tensor  # [B] int64


@torch.no_grad()
def compute_step_weights(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    turn_index: Tensor | None = None,
    epsilon: float = 1e-6,
    delta: float = 0.2,
) -> StepWeights:
    """Weights ``w_k = min((d_1 + epsilon) / (d_k + epsilon), 1 + delta)`` with ``w_1 = 1``.

    ``d_k`` (Eq. 6) is the mean of ``|student - teacher|`` over the mask-1 tokens of step k. Eq. 7
    writes ``w_k`` as a running product of ``(d_{u-1} + epsilon) / (d_u + epsilon)`` with the
    minimum taken outside; the product telescopes to the form above. Clipping inside the product
    would be another rule: what a clipped step lost, later steps would go without.

    Args:
        student_logprobs: ``[B, T]`` log-probs of the sampled tokens, nats.
        teacher_logprobs: ``[B, T]`` the same under the teacher; floored beforehand. A step with
            -inf left in it has ``d_k = inf`` and weight 0 (the first step keeps weight 1).
        loss_mask: ``[B, T]`` bool (or 0/1). Values where it is 0 never matter.
        turn_index: ``[B, T]`` integers, see :func:`index_steps`.
        epsilon: keeps the ratio finite, nats; positive.
        delta: how far a weight may rise above 1; at least 0, ``inf`` for no limit.

    Returns:
        :class:`StepWeights`, floats in float32 (float64 if the inputs are), computed in float64.

    Raises:
        ValueError: on shapes that differ, NaN or +inf inside the mask, or constants out of range.
    """
    if not epsilon > 0.0:
        raise ValueError(f"epsilon={epsilon} must be positive; the usual value is 1e-6")
    if not delta >= 0.0:
        raise ValueError(f"delta={delta} must be at least 0; the usual value is 0.2")
    for name, values in (("student", student_logprobs), ("teacher", teacher_logprobs)):
        if values.shape != loss_mask.shape:
            raise ValueError(
                f"{name}_logprobs has shape {tuple(values.shape)}, loss_mask "
                f"{tuple(loss_mask.shape)}; they must be equal"
            )
    mask = loss_mask.bool()
    require_finite("student_logprobs", student_logprobs, mask, allow_neg_inf=False)
    require_finite("teacher_logprobs", teacher_logprobs, mask, allow_neg_inf=True)
    rows_per_block = max(1, _BLOCK_VALUES // max(1, mask.shape[1])) if mask.is_cpu else len(mask)
    blocks = [
        _weights_of_samples(
            student_logprobs[rows],
            teacher_logprobs[rows],
            mask[rows],
            None if turn_index is None else turn_index[rows],
            epsilon,
            delta,
        )
        for rows in _slices(len(mask), rows_per_block)
    ]
    return blocks[0] if len(blocks) == 1 else _concatenate(blocks)


def _weights_of_samples(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor,
    turn_index: Tensor | None,
    epsilon: float,
    delta: float,
) -> StepWeights:
    step_index, num_steps = index_steps(mask, turn_index)
    divergence, lengths = _step_means(
        (student_logprobs.double() - teacher_logprobs.double()).abs(), step_index, num_steps
    )
    weights = weights_from_divergence(divergence, epsilon, delta)
    dtype = torch.promote_types(student_logprobs.dtype, torch.float32)
    return StepWeights(
        token_weights=spread_over_tokens(weights, step_index).to(dtype),
        step_index=step_index,
        step_divergence=divergence.to(dtype),
        step_weights=weights.to(dtype),
        step_lengths=lengths,
        num_steps=num_steps,
    )


def _slices(length: int, size: int) -> list[slice]:
    """Cover ``[0, length)``; one empty slice for no samples."""
    return [slice(start, start + size) for start in range(0, max(length, 1), max(size, 1))]


def _concatenate(blocks: Sequence[StepWeights]) -> StepWeights:
    """All samples; K is the largest of the blocks'."""
    max_steps = max(block.step_weights.shape[1] for block in blocks)

    def join(name: str, fill: float) -> Tensor:
        values = [getattr(block, name) for block in blocks]
        return torch.cat([F.pad(v, (0, max_steps - v.shape[1]), value=fill) for v in values])

    return StepWeights(
        token_weights=torch.cat([block.token_weights for block in blocks]),
        step_index=torch.cat([block.step_index for block in blocks]),
        step_divergence=join("step_divergence", torch.nan),
        step_weights=join("step_weights", torch.nan),
        step_lengths=join("step_lengths", 0),
        num_steps=torch.cat([block.num_steps for block in blocks]),
    )


def _step_means(values: Tensor, step_index: Tensor, num_steps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of ``values [B, T]`` over each step: ``[B, K]``, NaN past the last step; and lengths."""
    batch = values.shape[0]
    max_steps = int(num_steps.max()) if batch else 0
    inside = step_index >= 0
    # Tokens outside the steps go to a column of their own, which is dropped: nothing they hold,
    # not even NaN, can reach a sum.
    column = torch.where(inside, step_index, max_steps)
    sums = values.new_zeros(batch, max_steps + 1).scatter_add_(1, column, values)
    lengths = torch.zeros_like(sums, dtype=torch.long).scatter_add_(1, column, inside.long())
    sums, lengths = sums[:, :max_steps], lengths[:, :max_steps]
    return sums / lengths, lengths


def spread_over_tokens(step_weights: Tensor, step_index: Tensor) -> Tensor:
    """``[B, K], [B, T] -> [B, T]``: the weight of each token's step, 0 where the index is -1."""
    if step_weights.shape[1] == 0:
        return step_weights.new_zeros(step_index.shape)
    weights = step_weights.gather(1, step_index.clamp(min=0))
    return weights.masked_fill(step_index < 0, 0.0)


def weights_from_divergence(
    divergence: Tensor, epsilon: float, delta: float, *, first_floor: float = 0.0
) -> Tensor:
    """Apply Eq. 7 to ``divergence [B, K]``, with ``d_1`` at least ``first_floor``; keeps NaN."""
    first = divergence[:, :1].clamp(min=first_floor)
    ratio = (first + epsilon) / (divergence + epsilon)
    # inf / inf, when the first step is infinitely far from the teacher as well.
    ratio = ratio.masked_fill(torch.isinf(divergence), 0.0)
    weights = ratio.clamp(max=1.0 + delta)
    weights[:, :1] = torch.where(divergence[:, :1].isnan(), torch.nan, 1.0)
    return weights
