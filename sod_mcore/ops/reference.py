"""Every operation of this package in eager torch: the definition that a fused one is tested
against, and the implementation where none is built.

Logits are the local shard ``[N, V/tp]`` of a vocabulary split over a tensor-parallel group. The
arithmetic is float32 whatever the logits are (float64 for float64 logits, for gradient checks), and
takes several temporary copies of the logits' size.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sod_mcore.algorithm.divergences import k2_divergence, k3_divergence, topk_divergence
from sod_mcore.algorithm.policy_loss import clipped_token_loss
from sod_mcore.ops.collectives import max_over_ranks, sum_over_ranks
from sod_mcore.ops.objective import Objective
from sod_mcore.ops.result import StepWeightedKL
from sod_mcore.ops.vocab_shard import VocabShard, gather_owned

# Keeps log(0) out of autograd; float32 holds hardly any sum of exponentials below it.
SMALLEST_SUM = 1e-37


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each row's target and entropy of each row, over the whole vocabulary.

    Args:
        logits: ``[N, V/tp]`` local shard, bf16 or float32; N may be 0. Columns whose global index
            is ``vocab_size`` or more are padding: what they hold does not matter.
        targets: ``[N]`` integer global ids in ``[0, vocab_size)``, the same on every rank.
        vocab_size: number of real tokens.
        temperature: divides the logits; positive.
        group: tensor-parallel group; None where the logits are whole.

    Returns:
        ``logprobs [N]`` and ``entropy [N]`` in nats, float32, the same on every rank and
        differentiable: each rank's logits receive the gradient of the full loss once.

    Raises:
        ValueError: on wrong shapes, ids outside the vocabulary, or a temperature of 0 or less.
    """
    shard = VocabShard.of(logits, vocab_size, group)
    statistics = _row_statistics(logits, targets, None, temperature, shard)
    return statistics.logprobs, statistics.entropy


def step_weighted_kl(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    temperature: float,
    token_weights: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor | None = None,
    teacher_topk_ids: Tensor | None = None,
    teacher_topk_logprobs: Tensor | None = None,
    objective: Objective,
    overwrite_logits: bool = False,
) -> StepWeightedKL:
    """The loss of each sampled token as ``objective`` states it (see :class:`Objective`).

    Rows are tokens of the loss; a caller drops the others beforehand. The result is not divided by
    anything: normalising by the token count of the mini-batch is the caller's.

    Args:
        logits: ``[N, V/tp]`` local shard, bf16 or float32; N may be 0, and the collectives run all
            the same.
        targets: ``[N]`` integer global ids of the sampled tokens.
        vocab_size: number of real tokens; columns from there on are padding.
        group: tensor-parallel group; None where the logits are whole.
        temperature: divides the logits; positive.
        token_weights: ``[N]`` ``w_k`` of each token; multiplies k2, k3 and the top-K divergence,
            not the policy loss, whose advantages hold their weights already.
        advantages: ``[N]`` total advantages.
        old_logprobs: ``[N]`` log-probs at the start of the training step, nats.
        teacher_logprobs: ``[N]`` of the sampled tokens, floored; needed by k2 and k3.
        teacher_topk_ids: ``[N, K]`` integer global ids, distinct within a row, -1 for absent;
            needed by the top-K divergence.
        teacher_topk_logprobs: ``[N, K]`` nats; ignored where the id is -1; -inf counts as absent.
        objective: coefficients and divergence names.
        overwrite_logits: allows an implementation to use the logits' memory for their gradient.
            This one leaves them alone.

    Returns:
        :class:`StepWeightedKL`, float32, the same on every rank; gradients as in
        :func:`vocab_parallel_logprobs`. All arguments but ``logits`` are constants.

    Raises:
        ValueError: on wrong shapes, ids outside the vocabulary, or a teacher that the objective
            needs and that is missing or not finite.
    """
    del overwrite_logits
    _require_teacher(objective, teacher_logprobs, teacher_topk_ids, teacher_topk_logprobs)
    _require_rows(
        logits.shape[0],
        targets=targets,
        token_weights=token_weights,
        advantages=advantages,
        old_logprobs=old_logprobs,
        teacher_logprobs=teacher_logprobs,
    )
    shard = VocabShard.of(logits, vocab_size, group)
    topk_ids = None
    if objective.needs_teacher_topk and teacher_topk_ids is not None:
        shard.require_ids("teacher_topk_ids", teacher_topk_ids, lowest=-1)
        assert teacher_topk_logprobs is not None  # _require_teacher
        # What the teacher gives no probability is part of the rest, for the student as well.
        absent = (teacher_topk_ids < 0) | torch.isneginf(teacher_topk_logprobs)
        topk_ids = teacher_topk_ids.masked_fill(absent, -1)
        teacher_topk_logprobs = teacher_topk_logprobs.masked_fill(absent, -torch.inf)
    statistics = _row_statistics(logits, targets, topk_ids, temperature, shard)

    dtype = statistics.logprobs.dtype
    policy = clipped_token_loss(
        statistics.logprobs,
        old_logprobs.to(dtype),
        advantages.to(dtype),
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
    )
    terms: dict[str, Tensor] = {}
    if objective.policy_coefficient:
        terms["policy"] = objective.policy_coefficient * policy.token_loss
    distillation = _distillation_terms(
        objective, statistics, teacher_logprobs, teacher_topk_logprobs
    )
    weights = token_weights.detach().to(dtype)
    terms |= {name: weights * term for name, term in distillation.items()}
    if objective.entropy_coefficient:
        terms["entropy"] = -objective.entropy_coefficient * statistics.entropy
    return StepWeightedKL(
        token_loss=torch.stack(list(terms.values())).sum(0),
        logprobs=statistics.logprobs.detach(),
        entropy=statistics.entropy.detach(),
        ratio=policy.ratio,
        is_clipped=policy.is_clipped | policy.is_dual_clipped,
        terms={name: term.detach() for name, term in terms.items()},
    )


@dataclass(frozen=True)
class _RowStatistics:
    """What the loss needs to know of each row, reduced over the group; differentiable."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    topk_logprobs: Tensor  # [N, K]; meaningless where the id is -1
    tail_logprobs: Tensor  # [N] log of the probability outside the top-K ids


def _distillation_terms(
    objective: Objective,
    statistics: _RowStatistics,
    teacher_logprobs: Tensor | None,
    teacher_topk_logprobs: Tensor | None,
) -> dict[str, Tensor]:
    """The terms that token weights multiply, name -> ``[N]``."""
    terms: dict[str, Tensor] = {}
    dtype = statistics.logprobs.dtype
    if teacher_logprobs is not None:
        teacher = teacher_logprobs.detach().to(dtype)
        if objective.k2_coefficient:
            k2 = k2_divergence(statistics.logprobs, teacher)
            terms["k2"] = objective.k2_coefficient * k2
        if objective.k3_coefficient:
            k3 = k3_divergence(statistics.logprobs, teacher)
            terms["k3"] = objective.k3_coefficient * k3
    if objective.needs_teacher_topk and teacher_topk_logprobs is not None:
        divergence = topk_divergence(
            statistics.topk_logprobs,
            teacher_topk_logprobs.detach().to(dtype),
            divergence=objective.topk_divergence,
            jsd_beta=objective.jsd_beta,
            student_tail_logprobs=statistics.tail_logprobs,
        )
        terms[f"topk_{objective.topk_divergence}"] = objective.topk_coefficient * divergence
    return terms


def _row_statistics(
    logits: Tensor,
    targets: Tensor,
    topk_ids: Tensor | None,
    temperature: float,
    shard: VocabShard,
) -> _RowStatistics:
    """One maximum and one sum over the group give everything."""
    if not temperature > 0.0:
        raise ValueError(
            f"temperature={temperature} must be positive; greedy rollouts have no distribution to "
            "train, use 1.0"
        )
    num_rows = logits.shape[0]
    _require_rows(num_rows, targets=targets)
    shard.require_ids("targets", targets)
    if topk_ids is None:
        topk_ids = targets.new_empty(num_rows, 0)
    elif topk_ids.dim() != 2 or topk_ids.shape[0] != num_rows:
        raise ValueError(
            f"teacher_topk_ids has shape {tuple(topk_ids.shape)}; it must be [{num_rows}, K]"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Slicing, not masking: a padding column cannot even pass on a NaN, and its gradient is 0.
    scaled = logits[:, : shard.num_valid_columns].to(dtype) / temperature
    shifted = scaled - _row_max(scaled, shard)[:, None]

    column, is_owned = shard.locate(torch.cat([targets[:, None], topk_ids], dim=1))
    exp = shifted.exp()
    partial = torch.cat(
        [
            exp.sum(1, keepdim=True),
            # 0 * -inf, for a column masked to -inf, would be NaN.
            (exp * shifted.clamp(min=-1e4)).sum(1, keepdim=True),
            _sum_without(exp, column[:, 1:], is_owned[:, 1:]),
            gather_owned(shifted, column, is_owned),
        ],
        dim=1,
    )
    total = sum_over_ranks(partial, shard.group)  # [N, 3 + 1 + K]
    exp_sum, exp_shifted_sum, tail_sum = total[:, 0], total[:, 1], total[:, 2]
    log_sum = exp_sum.log()
    logprobs = total[:, 3:] - log_sum[:, None]
    return _RowStatistics(
        logprobs=logprobs[:, 0],
        entropy=log_sum - exp_shifted_sum / exp_sum,
        topk_logprobs=logprobs[:, 1:],
        # Summed over the columns that remain: 1 - sum(p_k) would have lost its digits.
        tail_logprobs=tail_sum.clamp(min=SMALLEST_SUM).log() - log_sum,
    )


def _row_max(scaled: Tensor, shard: VocabShard) -> Tensor:
    """``[N]`` maximum over the whole vocabulary; a shift, so it needs no gradient."""
    if shard.num_valid_columns == 0:
        return max_over_ranks(scaled.new_full(scaled.shape[:1], -torch.inf), shard.group)
    return max_over_ranks(scaled.detach().amax(dim=1), shard.group)


def _sum_without(exp: Tensor, column: Tensor, is_owned: Tensor) -> Tensor:
    """``[N, 1]`` sum of each row over the columns that are not among the owned ones."""
    if column.shape[1] == 0 or exp.shape[1] == 0:
        return exp.sum(1, keepdim=True)
    hits = torch.zeros(exp.shape, dtype=torch.int32, device=exp.device)
    hits.scatter_add_(1, column, is_owned.int())
    return exp.masked_fill(hits > 0, 0.0).sum(1, keepdim=True)


def _require_rows(num_rows: int, **arguments: Tensor | None) -> None:
    for name, values in arguments.items():
        if values is not None and values.shape != (num_rows,):
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}; it must be [{num_rows}], one value for "
                "each row of logits"
            )


def _require_teacher(
    objective: Objective,
    teacher_logprobs: Tensor | None,
    teacher_topk_ids: Tensor | None,
    teacher_topk_logprobs: Tensor | None,
) -> None:
    if objective.needs_teacher_logprobs:
        if teacher_logprobs is None:
            raise ValueError(
                "teacher_logprobs is missing; k2_coefficient and k3_coefficient need it, or set "
                "them to 0"
            )
        if not bool(torch.isfinite(teacher_logprobs).all()):
            raise ValueError(
                "teacher_logprobs is not finite everywhere; pass it through "
                "algorithm.floor_logprobs, and drop rows that were not scored"
            )
    if not objective.needs_teacher_topk:
        return
    if teacher_topk_ids is None or teacher_topk_logprobs is None:
        raise ValueError(
            "teacher_topk_ids and teacher_topk_logprobs are missing; topk_coefficient needs both, "
            "or set it to 0"
        )
    if teacher_topk_ids.shape != teacher_topk_logprobs.shape:
        raise ValueError(
            f"teacher_topk_ids has shape {tuple(teacher_topk_ids.shape)}, teacher_topk_logprobs "
            f"{tuple(teacher_topk_logprobs.shape)}; they must be equal"
        )
    present = teacher_topk_logprobs[teacher_topk_ids >= 0]
    if bool((present.isnan() | torch.isposinf(present)).any()):
        raise ValueError(
            "teacher_topk_logprobs holds NaN or +inf at an id that is present; mark an entry that "
            "was not scored with id -1"
        )
