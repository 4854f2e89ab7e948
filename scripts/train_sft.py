"""Supervised fine-tuning with Megatron-Core: cross-entropy on what the assistant says.

    torchrun --nproc-per-node N scripts/train_sft.py CONFIG [key=value ...]

The student, its layouts and its checkpoints are those of ``pretrain_sod.py``, and the tokens are
exactly those that a rollout of the same conversation would have.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from sod_mcore.chat import ChatRenderer
from sod_mcore.config import ConfigError, SftConfig
from sod_mcore.data.order import EpochOrder
from sod_mcore.data.plan import make_plan
from sod_mcore.data.sft import read_conversations, tokenize_conversations
from sod_mcore.loop.command_line import read_command_line
from sod_mcore.loop.ending import Ending, ending_in_order
from sod_mcore.loop.stop import StopRequest
from sod_mcore.report.metrics import MetricsLog, require_wandb
from sod_mcore.report.progress import Progress
from sod_mcore.student.examples import TrainingExample
from sod_mcore.student.model_config import ParallelSizes, check_layout
from sod_mcore.student.parallel_state import distributed
from sod_mcore.student.rank_zero import on_rank_zero
from sod_mcore.student.student import Student, UpdateResult

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
STOP_GRACE_SECONDS = 20.0


def main() -> None:
    """Train, then write the Hugging Face folder."""
    config = read_command_line(SftConfig, __doc__, sys.argv[1:])
    with ending_in_order(Path(config.sft.directory)) as ending:
        sizes = check_layout(
            config.student,
            int(os.environ.get("WORLD_SIZE", "1")),
            optimizer=config.optimizer,
            ddp=config.ddp,
        )
        require_wandb(config.report)
        train(config, sizes, load_examples(config), ending)


def load_examples(config: SftConfig) -> list[TrainingExample]:
    """Every conversation of the training file as tokens and loss mask."""
    renderer = ChatRenderer.from_folder(
        config.student.model_path, enable_thinking=config.chat.enable_thinking
    )
    conversations = read_conversations(Path(config.data.train))
    if len(conversations) < config.sft.batch_size:
        raise ConfigError(
            f"sft.batch_size is {config.sft.batch_size}; data.train={config.data.train} has only "
            f"{len(conversations)} conversations"
        )
    tokenized = tokenize_conversations(conversations, renderer, config.data.max_tokens)
    return [TrainingExample(t.token_ids, t.loss_mask) for t in tokenized]


def train(
    config: SftConfig,
    sizes: ParallelSizes,
    examples: Sequence[TrainingExample],
    ending: Ending,
) -> None:
    """The loop: draw a batch, update, until the updates or the time are used up."""
    stack = ending.stack
    stack.enter_context(distributed(sizes, seed=config.sft.seed, timeout=COLLECTIVE_TIMEOUT))
    student, first_update = open_student(config)
    group = student.layout.world_group
    directory = Path(config.sft.directory)
    stop = StopRequest(directory / "stop", STOP_GRACE_SECONDS, ending.record_forced_end)
    ending.begin(stop)
    log = bar = None
    if student.layout.rank == 0:
        log = stack.enter_context(_open_log(config, directory, first_update))
        bar = stack.enter_context(Progress("updates", config.sft.updates))
    started, update = time.monotonic(), first_update

    def is_time_up() -> bool:
        limit = config.sft.max_seconds
        return limit is not None and time.monotonic() - started > limit

    while update < config.sft.updates:
        result = student.train_sft_mini_batch(draw_batch(config, examples, student, update))
        update += 1
        ending.completed_steps = update
        if log is not None and bar is not None:
            log.log(update, update_metrics(result))
            bar.advance_to(update, loss=result.loss)
        reason = on_rank_zero(
            lambda: stop.reason or ("sft.max_seconds" if is_time_up() else None), group
        )
        if reason is not None and reason != "sft.max_seconds":
            save(student, config, update)
            if bar is not None:
                print(f"stopped after {update} updates because of {reason}", file=sys.stderr)
            ending.succeed("stopped", reason)
            stop.clear()
            return
        if reason is not None:
            break
        if config.sft.save_every and update % config.sft.save_every == 0:
            save(student, config, update)
    save(student, config, update)
    student.export_hf(config.sft.export)
    ending.succeed("finished", "all updates are done, or the time is up")


def open_student(config: SftConfig) -> tuple[Student, int]:
    """The student with the newest checkpoint's weights, or the configured folder's."""
    student = Student.build(
        config.student,
        config.optimizer,
        config.ddp,
        total_updates=config.sft.updates,
        seed=config.sft.seed,
    )
    progress = student.load_checkpoint(Path(config.sft.directory) / "checkpoints")
    if progress is not None:
        return student, int(progress["update"])
    student.load_hf(config.student.model_path)
    return student, 0


def draw_batch(
    config: SftConfig, examples: Sequence[TrainingExample], student: Student, update: int
) -> list[list[TrainingExample]]:
    """This replica's micro-batches of update number ``update``; the same for every restart."""
    indices = EpochOrder(len(examples), config.sft.seed).batch(update, config.sft.batch_size)
    plan = make_plan(
        lengths=[len(examples[i]) for i in indices],
        num_loss_tokens=[examples[i].num_loss_tokens for i in indices],
        group_ids=[str(i) for i in indices],
        prompts_per_mini_batch=config.sft.batch_size,
        epochs=1,
        seed=(config.sft.seed, update),
        data_parallel_size=student.layout.data_parallel_size,
        micro_batch_tokens=config.student.micro_batch_tokens,
        packing=config.student.packing,
    )
    replica = plan.mini_batches[0].replicas[student.layout.data_parallel_rank]
    return [[examples[indices[i]] for i in micro_batch] for micro_batch in replica]


def save(student: Student, config: SftConfig, update: int) -> None:
    """Write a checkpoint from which the same command continues."""
    directory = Path(config.sft.directory) / "checkpoints"
    student.save_checkpoint(directory, update, {"update": update}, keep=1)


def update_metrics(result: UpdateResult) -> dict[str, float]:
    """What is logged about one update."""
    return {
        "sft/loss": result.loss,
        "sft/grad_norm": result.grad_norm,
        "sft/lr": result.lr,
        "sft/tokens": float(result.num_tokens),
    }


def _open_log(config: SftConfig, directory: Path, first_update: int) -> MetricsLog:
    settings = dataclasses.asdict(config)
    first_step = first_update + 1 if first_update > 0 else 0
    return MetricsLog(directory, config.report, settings, first_step=first_step)


if __name__ == "__main__":
    main()
