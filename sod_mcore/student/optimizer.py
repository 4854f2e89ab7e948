"""Megatron's optimizer and learning-rate schedule, from the ``optimizer`` section."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from sod_mcore.config import ConfigError, OptimizerConfig
from sod_mcore.student.backend import adam_implementation


def build_optimizer(
    config: OptimizerConfig, model: DistributedDataParallel, *, is_bf16: bool
) -> MegatronOptimizer:
    """AdamW on float32 main parameters, clipped by the norm over all ranks.

    Megatron builds it around the Adam that :func:`adam_implementation` names.
    """
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_betas[0],
            adam_beta2=config.adam_betas[1],
            clip_grad=config.clip_grad,
            use_distributed_optimizer=config.distributed,
            bf16=is_bf16,
            params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
            **config.megatron,
        ),
        [model],
    )


def build_schedule(
    config: OptimizerConfig, optimizer: MegatronOptimizer, total_updates: int
) -> OptimizerParamScheduler:
    """Warm-up from 0 to ``lr``, then a constant, linear or cosine course to ``min_lr``.

    Update ``u`` (from 1) uses the schedule's value at ``u`` of ``total_updates + 1``, so neither
    the first update of a warm-up nor the last of a decay to 0 is wasted on a rate of 0.

    Raises:
        ConfigError: the warm-up is not shorter than the run.
    """
    if config.warmup_updates >= total_updates and config.warmup_updates > 0:
        raise ConfigError(
            f"optimizer.warmup_updates is {config.warmup_updates}; it must be below the run's "
            f"{total_updates} optimizer updates"
        )
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=min(config.min_lr, config.lr),
        lr_warmup_steps=config.warmup_updates,
        lr_decay_steps=total_updates + 1,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_updates + 1,
        wd_incr_style="constant",
    )
    schedule.step(1)
    return schedule


def initialize_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter the state that AdamW would make in its first step.

    A checkpoint is loaded into existing state. Megatron itself makes that of the fused Adams, which
    count steps by parameter group; torch's counts them by parameter, and Megatron does not know it.
    """
    if adam_implementation() != "torch":
        return
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state.get(parameter):
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
