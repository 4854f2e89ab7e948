"""Joins trajectories, plan and signals into what the student trains on."""

from __future__ import annotations

from collections.abc import Sequence

from sod_mcore.algorithm.signals import BatchSignals
from sod_mcore.config import AlgorithmConfig, SodConfig
from sod_mcore.data.plan import MiniBatch, Plan, make_plan
from sod_mcore.ops import Objective
from sod_mcore.student.examples import TrainingExample
from sod_mcore.trajectory import Trajectory


def plan_step(
    trajectories: Sequence[Trajectory], config: SodConfig, step: int, data_parallel_size: int
) -> Plan:
    """Mini-batches of whole groups, balanced over replicas and packed into micro-batches."""
    return make_plan(
        lengths=[len(t) for t in trajectories],
        num_loss_tokens=[int(t.loss_mask.sum()) for t in trajectories],
        group_ids=[t.group_id for t in trajectories],
        prompts_per_mini_batch=config.algorithm.prompts_per_mini_batch,
        epochs=config.algorithm.epochs,
        seed=(config.run.seed, step),
        data_parallel_size=data_parallel_size,
        micro_batch_tokens=config.student.micro_batch_tokens,
        packing=config.student.packing,
    )


def first_epoch(plan: Plan, epochs: int) -> tuple[MiniBatch, ...]:
    """The mini-batches that hold every trajectory once."""
    return plan.mini_batches[: len(plan.mini_batches) // epochs]


def indices_in_order(mini_batch: MiniBatch) -> list[int]:
    """Trajectory indices in the order in which the replicas' results are gathered."""
    return [i for replica in mini_batch.replicas for micro_batch in replica for i in micro_batch]


def scoring_examples(
    trajectories: Sequence[Trajectory], mini_batch: MiniBatch, data_parallel_rank: int
) -> list[list[TrainingExample]]:
    """This replica's micro-batches for a forward pass that only wants log-probs."""
    return [
        [TrainingExample(trajectories[i].token_ids, trajectories[i].loss_mask) for i in micro_batch]
        for micro_batch in mini_batch.replicas[data_parallel_rank]
    ]


def training_examples(
    trajectories: Sequence[Trajectory],
    signals: BatchSignals,
    mini_batch: MiniBatch,
    data_parallel_rank: int,
) -> list[list[TrainingExample]]:
    """This replica's micro-batches for one optimizer update."""
    return [
        [_training_example(trajectories[i], signals, i) for i in micro_batch]
        for micro_batch in mini_batch.replicas[data_parallel_rank]
    ]


def make_objective(config: AlgorithmConfig) -> Objective:
    """The loss of the fused op, from the configuration."""
    coefficient = config.distillation_coefficient
    return Objective(
        policy_coefficient=1.0,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        k2_coefficient=coefficient if config.distillation == "k2_loss" else 0.0,
        k3_coefficient=coefficient if config.distillation == "k3_loss" else 0.0,
        topk_divergence=config.topk.divergence,
        topk_coefficient=config.topk.coefficient if config.topk.k > 0 else 0.0,
        jsd_beta=config.topk.jsd_beta,
        entropy_coefficient=config.entropy_coefficient,
    )


def _training_example(trajectory: Trajectory, signals: BatchSignals, index: int) -> TrainingExample:
    signal = signals.trajectories[index]
    return TrainingExample(
        token_ids=trajectory.token_ids,
        loss_mask=signal.loss_mask,
        advantages=signal.advantages,
        token_weights=signal.token_weights,
        old_logprobs=signal.old_logprobs,
        teacher_logprobs=signal.teacher_logprobs,
        teacher_topk_ids=trajectory.teacher_topk_ids,
        teacher_topk_logprobs=trajectory.teacher_topk_logprobs,
    )
