"""The student as the training programs see it: a handful of collective methods.

Every rank calls every method, with its replica's data. What comes back is the same on all ranks
unless a method says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from numpy.typing import NDArray

from sod_mcore import ops
from sod_mcore.config import OptimizerConfig, StudentConfig
from sod_mcore.student import checkpoint
from sod_mcore.student.architecture import Architecture, read_architecture
from sod_mcore.student.average import WeightAverage
from sod_mcore.student.conversion.export import NamedTensors, iterate_hf_tensors
from sod_mcore.student.conversion.load import load_hf_weights
from sod_mcore.student.conversion.save import save_hf_folder
from sod_mcore.student.examples import TrainingExample
from sod_mcore.student.exchange import gather_to_rank0, sum_over_ranks, wait_for_all
from sod_mcore.student.forward_backward import MicroBatches, Schedule
from sod_mcore.student.model import build_model, unwrap
from sod_mcore.student.optimizer import build_optimizer, build_schedule
from sod_mcore.student.output import TERM_PREFIX
from sod_mcore.student.output_head import make_output_head
from sod_mcore.student.parallel_state import ParallelLayout, current_layout, seed_everything

EXPORT_BUCKET_BYTES = 1 << 30


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer update; means are over the loss tokens of the whole mini-batch.

    Attributes:
        loss: mean token loss.
        grad_norm: norm of the whole gradient before clipping.
        lr: learning rate of the update.
        num_tokens: loss tokens over all replicas.
        entropy: mean entropy of the student, nats.
        clip_fraction: share of tokens whose ratio was clipped.
        dual_clip_fraction: share of tokens at the dual-clip bound.
        approx_kl: mean of old minus new log-prob, nats.
        terms: mean of each summand of the loss.
        skipped: no token carried loss, so nothing was computed and no update was made.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0
    num_tokens: int = 0
    entropy: float = 0.0
    clip_fraction: float = 0.0
    dual_clip_fraction: float = 0.0
    approx_kl: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    skipped: bool = False


@dataclass(frozen=True)
class Student:
    """Model, optimizer and schedule of this rank; made by :meth:`build`."""

    layout: ParallelLayout
    architecture: Architecture
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    batches: Schedule
    source_folder: Path
    average: WeightAverage | None = None

    @classmethod
    def build(
        cls,
        student: StudentConfig,
        optimizer: OptimizerConfig,
        ddp: Mapping[str, Any],
        *,
        total_updates: int,
        seed: int,
        average_decay: float | None = None,
    ) -> Student:
        """Build the student; its weights are unset until :meth:`load_hf` or a checkpoint.

        The parallel state must be initialised and the configuration checked (``check_layout``).

        Args:
            ddp: fields of Megatron's DistributedDataParallelConfig.
            total_updates: optimizer updates of the whole run, the horizon of the schedule.
            average_decay: keep an average of the weights with this decay; None keeps none.
        """
        layout = current_layout()
        seed_everything(seed, layout)
        architecture = read_architecture(student.model_path)
        model = build_model(
            student,
            architecture,
            layout,
            ddp=ddp,
            use_distributed_optimizer=optimizer.distributed,
        )
        config = unwrap(model).config
        megatron_optimizer = build_optimizer(optimizer, model, is_bf16=config.bf16)
        return cls(
            layout=layout,
            architecture=architecture,
            model=model,
            optimizer=megatron_optimizer,
            schedule=build_schedule(optimizer, megatron_optimizer, total_updates),
            batches=Schedule(
                model=model,
                layout=layout,
                vocab_size=architecture.vocab_size,
                packing=student.packing,
                length_multiple=layout.tensor_parallel_size if config.sequence_parallel else 1,
                head=make_output_head(student),
            ),
            source_folder=Path(student.model_path),
            average=None if average_decay is None else WeightAverage(model, average_decay),
        )

    @property
    def vocab_size(self) -> int:
        """Number of real tokens."""
        return self.architecture.vocab_size

    def load_hf(self, folder: str | Path) -> None:
        """Set the weights from a Hugging Face folder; the optimizer starts from them."""
        load_hf_weights(unwrap(self.model), self.architecture, self.layout, folder)
        self.optimizer.reload_model_params()
        if self.average is not None:
            self.average.restart()

    def compute_logprobs(self, micro_batches: MicroBatches) -> list[NDArray[np.float32]] | None:
        """Log-probs of the tokens that carry loss, by a forward pass.

        Args:
            micro_batches: this replica's; every replica gives the same number, empty ones allowed.

        Returns:
            on global rank 0 float32 ``[T]`` for every trajectory (NaN outside the mask), those of
            replica 0 in order, then those of replica 1, and so on; None elsewhere.
        """
        values = self.batches.compute_logprobs(micro_batches or [[]])
        return gather_to_rank0(
            values if self.layout.reports_loss else None, self.layout.world_group
        )

    def train_mini_batch(
        self, micro_batches: MicroBatches, objective: ops.Objective
    ) -> UpdateResult:
        """One optimizer update on the objective.

        Args:
            micro_batches: this replica's; every replica gives the same number, empty ones allowed.
        """
        return self._update(micro_batches, objective)

    def train_sft_mini_batch(self, micro_batches: MicroBatches) -> UpdateResult:
        """One optimizer update on the cross-entropy of the masked tokens."""
        return self._update(micro_batches, None)

    def hf_tensors(self, bucket_bytes: int, *, averaged: bool = False) -> Iterator[NamedTensors]:
        """The weights, or their average, under Hugging Face names; :func:`iterate_hf_tensors`."""
        self._wait_for_parameters()
        parameters = self._averaged_parameters() if averaged else None
        return iterate_hf_tensors(
            unwrap(self.model), self.architecture, self.layout, bucket_bytes, parameters
        )

    def export_hf(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = EXPORT_BUCKET_BYTES,
        averaged: bool = False,
    ) -> None:
        """Write a Hugging Face folder; complete on return, on every rank.

        Args:
            dtype: of the weights on disk; None keeps the model's.
            bucket_bytes: size of each file, and of what rank 0 gathers at a time.
            averaged: write the average of the weights instead.
        """
        buckets = self.hf_tensors(bucket_bytes, averaged=averaged)
        if self.layout.rank == 0:
            save_hf_folder(buckets, self.source_folder, folder, dtype=dtype)
        else:
            for _ in buckets:
                pass
        wait_for_all(self.layout.world_group)

    def save_checkpoint(
        self, directory: str | Path, step: int, progress: Mapping[str, Any], keep: int = 2
    ) -> None:
        """Write weights, optimizer, schedule and random states; see :mod:`checkpoint`."""
        self._wait_for_parameters()
        checkpoint.save(self._state(), Path(directory), step, progress, keep=keep)

    def load_checkpoint(self, directory: str | Path) -> dict[str, Any] | None:
        """Continue from the newest complete checkpoint; its ``progress``, or None without one."""
        return checkpoint.load_newest(self._state(), Path(directory))

    def _state(self) -> checkpoint.TrainingState:
        return checkpoint.TrainingState(
            self.model, self.optimizer, self.schedule, self.layout, self.average
        )

    def _averaged_parameters(self) -> Mapping[str, torch.Tensor]:
        if self.average is None:
            raise ValueError("this student keeps no average of its weights; give average_decay")
        return self.average.parameters()

    def _wait_for_parameters(self) -> None:
        """With overlapped gathering, weights are stale until the next forward pass needs them."""
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)

    def _update(self, micro_batches: MicroBatches, objective: ops.Objective | None) -> UpdateResult:
        num_tokens = self._count_tokens(micro_batches)
        if num_tokens == 0:
            return UpdateResult(skipped=True)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self.batches.accumulate_gradients(micro_batches or [[]], objective)
        lr = float(self.optimizer.param_groups[0]["lr"])
        _, grad_norm, _ = self.optimizer.step()
        self.schedule.step(1)
        if self.average is not None:
            self._wait_for_parameters()
            self.average.update()
        totals = sum_over_ranks(sums if self.layout.reports_loss else {}, self.layout.world_group)
        means = {name: total / num_tokens for name, total in totals.items()}
        return UpdateResult(
            loss=means["loss"],
            grad_norm=float(grad_norm or 0.0),
            lr=lr,
            num_tokens=num_tokens,
            entropy=means["entropy"],
            clip_fraction=means.get("clip_fraction", 0.0),
            dual_clip_fraction=means.get("dual_clip_fraction", 0.0),
            approx_kl=means.get("approx_kl", 0.0),
            terms={
                name.removeprefix(TERM_PREFIX): value
                for name, value in means.items()
                if name.startswith(TERM_PREFIX)
            },
        )

    def _count_tokens(self, micro_batches: Sequence[Sequence[TrainingExample]]) -> int:
        """Loss tokens of the mini-batch over all replicas."""
        count = sum(example.num_loss_tokens for batch in micro_batches for example in batch)
        is_leader = self.layout.reports_loss
        total = torch.tensor([count if is_leader else 0], dtype=torch.int64)
        torch.distributed.all_reduce(total, group=self.layout.world_group)
        return int(total)
