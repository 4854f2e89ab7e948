"""Every operation of this package in eager torch: the definition that a fused one is tested
against, and the implementation where none is built.

Logits are the local shard ``[N, V/tp]`` of a vocabulary split over a tensor-parallel group. The
arithmetic is float32 whatever the logits are (float64 for float64 logits, for gradient checks), and
takes several temporary copies of the logits' size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sod_mcore.algorithm.divergences import k2_divergence, k3_divergence, topk_divergence
from sod_mcore.algorithm.policy_loss import clipped_token_loss
from sod_mcore.ops.arguments import (
    DEFAULT_CHUNK_ROWS,
    LossInputs,
    check_linear_arguments,
    check_logprob_arguments,
    check_loss_arguments,
)
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
    overwrite_logits: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each row's target and entropy of each row, over the whole vocabulary.

    Args:
        logits: ``[N, V/tp]`` local shard, bf16 or float32; N may be 0. Columns whose global index
            is ``vocab_size`` or more are padding: what they hold does not matter.
        targets: ``[N]`` int32 or int64 global ids in ``[0, vocab_size)``, the same on every rank;
            -1 marks a row to leave out, whose results and gradient are 0.
        vocab_size: number of real tokens.
        temperature: divides the logits; positive.
        group: tensor-parallel group; None where the logits are whole.
        overwrite_logits: as in :func:`step_weighted_kl`.
        validate: also checks values, which makes the CPU wait for the GPU.

    Returns:
        ``logprobs [N]`` and ``entropy [N]`` in nats, float32, the same on every rank and
        differentiable: each rank's logits receive the gradient of the full loss once.

    Raises:
        ValueError: on wrong shapes, dtypes, devices or layouts, a temperature of 0 or less, and
            with ``validate`` on ids outside the vocabulary.
    """
    del overwrite_logits
    shard = check_logprob_arguments(
        logits,
        targets,
        vocab_size=vocab_size,
        temperature=temperature,
        group=group,
        validate=validate,
    )
    statistics = _row_statistics(logits, targets, None, None, temperature, shard)
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
    validate: bool = False,
) -> StepWeightedKL:
    """The loss of each sampled token as ``objective`` states it (see :class:`Objective`).

    Rows are tokens of the loss; a caller drops the others beforehand, or marks them with target -1.
    The result is not divided by anything: normalising by the token count of the mini-batch is the
    caller's.

    Args:
        logits: ``[N, V/tp]`` local shard, bf16 or float32; N may be 0, and the collectives run all
            the same.
        targets: ``[N]`` int32 or int64 global ids of the sampled tokens; -1 marks a row without
            loss, whose results and gradient are 0.
        vocab_size: number of real tokens; columns from there on are padding.
        group: tensor-parallel group; None where the logits are whole.
        temperature: divides the logits; positive.
        token_weights: ``[N]`` float32, as all that follow: ``w_k`` of each token; multiplies k2,
            k3 and the top-K divergence, not the policy loss, whose advantages hold their weights.
        advantages: ``[N]`` total advantages.
        old_logprobs: ``[N]`` log-probs at the start of the training step, nats.
        teacher_logprobs: ``[N]`` of the sampled tokens, floored; needed by k2 and k3.
        teacher_topk_ids: ``[N, K]`` int32 or int64 global ids, distinct within a row, -1 for
            absent, K at most 128; needed by the top-K divergence. Where they are given, the result
            has the student's log-probs of them.
        teacher_topk_logprobs: ``[N, K]`` nats; ignored where the id is -1. An id at -inf is no
            bucket of its own and belongs to the rest.
        objective: coefficients and divergence names.
        overwrite_logits: allows an implementation to use the logits' memory for their gradient,
            which then is computed once only; not for a leaf. This one leaves them alone.
        validate: also checks values, which makes the CPU wait for the GPU.

    Returns:
        :class:`StepWeightedKL`, float32, the same on every rank; gradients as in
        :func:`vocab_parallel_logprobs`. All arguments but ``logits`` are constants.

    Raises:
        ValueError: on wrong shapes, dtypes, devices or layouts, a teacher that the objective needs
            and that is missing, and with ``validate`` on ids outside the vocabulary, ids twice in
            a row, and numbers that are not finite.
    """
    del overwrite_logits
    inputs = LossInputs(
        targets=targets,
        token_weights=token_weights,
        advantages=advantages,
        old_logprobs=old_logprobs,
        teacher_logprobs=teacher_logprobs,
        teacher_topk_ids=teacher_topk_ids,
        teacher_topk_logprobs=teacher_topk_logprobs,
    ).detach()
    shard = check_loss_arguments(
        logits,
        inputs,
        vocab_size=vocab_size,
        temperature=temperature,
        group=group,
        objective=objective,
        validate=validate,
    )
    statistics = _row_statistics(
        logits, targets, teacher_topk_ids, inputs.teacher_topk_logprobs, temperature, shard
    )
    return _loss_from_statistics(statistics, inputs, objective)


def linear_vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    logits_dtype: torch.dtype | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`vocab_parallel_logprobs` of ``hidden @ weight.T``.

    Arguments as in :func:`linear_step_weighted_kl`. Where the chunked implementation stands in, the
    entropy carries no gradient and all log-probs must get the same.
    """
    dtype = check_linear_arguments(hidden, weight, chunk_rows, logits_dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return vocab_parallel_logprobs(
        logits,
        targets,
        vocab_size=vocab_size,
        temperature=temperature,
        group=group,
        validate=validate,
    )


def linear_step_weighted_kl(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    logits_dtype: torch.dtype | None = None,
    **arguments: Any,
) -> StepWeightedKL:
    """:func:`step_weighted_kl` of ``hidden @ weight.T``: output layer and loss in one.

    An implementation may compute the gradient in the forward pass, chunk by chunk, so that the
    logits of one chunk are all that is ever alive. The loss that is differentiated must then be a
    sum of the token losses times one number.

    Args:
        hidden: ``[N, h]`` last hidden states, bf16 or float32, the same on every rank of the group.
            Their gradient is this rank's summand: the caller sums it over the group, as Megatron's
            ``copy_to_tensor_model_parallel_region`` does.
        weight: ``[V/tp, h]`` this rank's rows of the output layer, of the same dtype. A parameter
            of Megatron's gradient buffer gets its gradient there (``main_grad``).
        targets: ``[N]`` as in :func:`step_weighted_kl`.
        chunk_rows: rows whose logits are alive at a time.
        logits_dtype: float32 keeps the logits as the matrix product accumulates them; None rounds
            them to the dtype of ``hidden``.
        arguments: the other arguments of :func:`step_weighted_kl`, but for ``overwrite_logits``.

    Raises:
        ValueError: as :func:`step_weighted_kl`, and on shapes or dtypes of the two that do not fit.
        RuntimeError: in the backward pass, if tokens get different gradients.
    """
    dtype = check_linear_arguments(hidden, weight, chunk_rows, logits_dtype)
    return step_weighted_kl(hidden.to(dtype) @ weight.to(dtype).T, targets, **arguments)


def _loss_from_statistics(
    statistics: _RowStatistics, inputs: LossInputs, objective: Objective
) -> StepWeightedKL:
    """Everything past the logits."""
    dtype = statistics.logprobs.dtype
    policy = clipped_token_loss(
        statistics.logprobs,
        inputs.old_logprobs.to(dtype),
        inputs.advantages.to(dtype),
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
    )
    terms: dict[str, Tensor] = {}
    if objective.policy_coefficient:
        terms["policy"] = objective.policy_coefficient * policy.token_loss
    weights = inputs.token_weights.to(dtype)
    for name, term in _distillation_terms(objective, statistics, inputs).items():
        terms[name] = weights * term
    if objective.entropy_coefficient:
        terms["entropy"] = -objective.entropy_coefficient * statistics.entropy
    # Chosen, not multiplied: what stands in a row without loss may be NaN.
    is_left_out = inputs.targets < 0
    terms = {name: term.masked_fill(is_left_out, 0.0) for name, term in terms.items()}
    return StepWeightedKL(
        token_loss=torch.stack(list(terms.values())).sum(0),
        logprobs=statistics.logprobs.detach(),
        entropy=statistics.entropy.detach(),
        ratio=policy.ratio.masked_fill(is_left_out, 0.0),
        is_clipped=(policy.is_clipped | policy.is_dual_clipped) & ~is_left_out,
        terms={name: term.detach() for name, term in terms.items()},
        topk_logprobs=_reported_topk(statistics, inputs),
    )


def _reported_topk(statistics: _RowStatistics, inputs: LossInputs) -> Tensor | None:
    """The student's log-probs of the ids that were asked for; -inf where the id is -1."""
    if inputs.teacher_topk_ids is None:
        return None
    absent = inputs.teacher_topk_ids < 0
    reported = statistics.topk_logprobs.detach().masked_fill(absent, -torch.inf)
    return reported.masked_fill(inputs.targets[:, None] < 0, 0.0)


@dataclass(frozen=True)
class _RowStatistics:
    """What the loss needs to know of each row, reduced over the group; differentiable."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    topk_logprobs: Tensor  # [N, K]; meaningless where the id is -1
    tail_logprobs: Tensor  # [N] log of the probability outside the top-K ids


def _distillation_terms(
    objective: Objective, statistics: _RowStatistics, inputs: LossInputs
) -> dict[str, Tensor]:
    """The terms that token weights multiply, name -> ``[N]``."""
    terms: dict[str, Tensor] = {}
    dtype = statistics.logprobs.dtype
    if inputs.teacher_logprobs is not None:
        teacher = inputs.teacher_logprobs.to(dtype)
        if objective.k2_coefficient:
            k2 = k2_divergence(statistics.logprobs, teacher)
            terms["k2"] = objective.k2_coefficient * k2
        if objective.k3_coefficient:
            k3 = k3_divergence(statistics.logprobs, teacher)
            terms["k3"] = objective.k3_coefficient * k3
    topk_logprobs, ids = inputs.teacher_topk_logprobs, inputs.teacher_topk_ids
    if objective.needs_teacher_topk and topk_logprobs is not None and ids is not None:
        divergence = topk_divergence(
            statistics.topk_logprobs,
            topk_logprobs.to(dtype).masked_fill(ids < 0, -torch.inf),
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
    teacher_topk_logprobs: Tensor | None,
    temperature: float,
    shard: VocabShard,
) -> _RowStatistics:
    """One maximum and one sum over the group give everything."""
    if topk_ids is None:
        topk_ids = targets.new_empty(targets.shape[0], 0)
    is_bucket = topk_ids >= 0
    if teacher_topk_logprobs is not None:
        # What the teacher gives no probability is part of the rest, for the student as well.
        is_bucket = is_bucket & ~torch.isneginf(teacher_topk_logprobs)
    is_left_out = targets < 0
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Slicing, not masking: a padding column cannot even pass on a NaN, and its gradient is 0.
    scaled = logits[:, : shard.num_valid_columns].to(dtype) / temperature
    scaled = scaled.masked_fill(is_left_out[:, None], 0.0)
    shifted = scaled - _row_max(scaled, shard)[:, None]

    column, is_owned = shard.locate(torch.cat([targets[:, None], topk_ids], dim=1))
    exp = shifted.exp()
    partial = torch.cat(
        [
            exp.sum(1, keepdim=True),
            # 0 * -inf, for a column masked to -inf, would be NaN.
            (exp * shifted.clamp(min=-1e4)).sum(1, keepdim=True),
            _sum_without(exp, column[:, 1:], is_owned[:, 1:] & is_bucket),
            gather_owned(shifted, column, is_owned),
        ],
        dim=1,
    )
    total = sum_over_ranks(partial, shard.group)  # [N, 3 + 1 + K]
    exp_sum, exp_shifted_sum, tail_sum = total[:, 0], total[:, 1], total[:, 2]
    log_sum = exp_sum.log()
    logprobs = total[:, 3:] - log_sum[:, None]
    return _RowStatistics(
        logprobs=logprobs[:, 0].masked_fill(is_left_out, 0.0),
        entropy=(log_sum - exp_shifted_sum / exp_sum).masked_fill(is_left_out, 0.0),
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
