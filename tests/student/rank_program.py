"""What each torchrun process of the student's tests runs: every case, one after another.

Actions of a case, in any order; each leaves its result under its own name:

- ``logprobs``: log-probs of all examples.
- ``sft_gradient`` and ``objective_gradient``: sums and normalised gradients under Hugging Face
  names, without an update.
- ``round_trip``: the exported tensors, and the bytes of each bucket.
- ``resume``: losses and weights of four updates, and of two updates, a checkpoint and two more by a
  student that was built anew.
- ``load_checkpoint``: log-probs after loading what ``resume`` of another case has written.
- ``average``: the weights before and after each of three updates, and their average at the end,
  also of a student that was built anew before the third.
- ``refuse_average``: what is said when a checkpoint without an average is to continue with one, and
  whether one with an average continues without.
- ``load_average``: that average, of a layout that loads the checkpoint of ``average``.
- ``train``: losses and weights of three cross-entropy updates.
- ``empty``: the result of a mini-batch in which no token carries loss.
- ``exchange``: what rank 1 received, and what rank 0 gathered.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sod_mcore.config import ConfigError, OptimizerConfig, StudentConfig
from sod_mcore.ops import Objective
from sod_mcore.student.exchange import broadcast_from_rank0, gather_to_rank0
from sod_mcore.student.model_config import check_layout
from sod_mcore.student.parallel_state import (
    current_layout,
    destroy_model_parallel,
    initialize_parallel_state,
)
from sod_mcore.student.student import Student
from tests.student.harness import Case, make_examples, split_examples

OBJECTIVE = Objective(k3_coefficient=0.3, entropy_coefficient=0.01)
EXPORT_BUCKET = 60_000
CHECKPOINT_SUFFIX = "_checkpoints"
AVERAGE_DECAY = 0.75


def main() -> None:
    """Work off the cases in the folder given on the command line."""
    folder = Path(sys.argv[1])
    for case in torch.load(folder / "cases.pt", weights_only=False):
        config = student_config(case, folder)
        optimizer = OptimizerConfig(
            lr=1e-3, schedule="cosine", warmup_updates=1, distributed=case.distributed_optimizer
        )
        sizes = check_layout(config, int(os.environ["WORLD_SIZE"]), ddp=case.ddp)
        initialize_parallel_state(sizes, seed=3, timeout=timedelta(seconds=120))
        runner = Runner(case, config, optimizer, folder)
        results = {action: getattr(runner, action)() for action in case.actions}
        if dist.get_rank() == 0:
            torch.save(results, folder / f"{case.name}.pt")
        dist.barrier()
        destroy_model_parallel()
    dist.destroy_process_group()


def student_config(case: Case, folder: Path) -> StudentConfig:
    """The configuration of a case."""
    return StudentConfig(
        model_path=str(folder.parent / "models" / case.model),
        precision=case.precision,  # type: ignore[arg-type]
        packing=case.packing,  # type: ignore[arg-type]
        megatron={
            "tensor_model_parallel_size": case.tensor,
            "pipeline_model_parallel_size": case.pipeline,
            "sequence_parallel": case.sequence_parallel,
            **case.megatron,
        },
        **case.student,
    )


class Runner:
    """The actions of one case on this rank."""

    def __init__(
        self, case: Case, config: StudentConfig, optimizer: OptimizerConfig, folder: Path
    ) -> None:
        self.case = case
        self.config = config
        self.optimizer = optimizer
        self.folder = folder
        self.layout = current_layout()
        self.student = self.build()
        self.student.load_hf(config.model_path)
        self.micro_batches = split_examples(
            make_examples(), case, self.layout.data_parallel_rank, self.layout.data_parallel_size
        )

    def build(self, average_decay: float | None = None) -> Student:
        return Student.build(
            self.config,
            self.optimizer,
            self.case.ddp,
            total_updates=6,
            seed=3,
            average_decay=average_decay,
        )

    def logprobs(self) -> Any:
        return self.student.compute_logprobs(self.micro_batches)

    def sft_gradient(self) -> dict[str, Any]:
        return self.gradient(None)

    def objective_gradient(self) -> dict[str, Any]:
        return self.gradient(OBJECTIVE)

    def gradient(self, objective: Objective | None) -> dict[str, Any]:
        """Export the gradients in the place of the weights, which are loaded again afterwards."""
        student = self.student
        student.model.zero_grad_buffer()
        sums = student.batches.accumulate_gradients(self.micro_batches, objective)
        for parameter in student.model.parameters():
            parameter.data.copy_(parameter.main_grad)
        gradients = self.weights()
        student.load_hf(self.config.model_path)
        everything: list[Any] = [None] * self.layout.world_size
        dist.all_gather_object(everything, sums if self.layout.reports_loss else {})
        return {"sums": [sums for sums in everything if sums], "gradients": gradients}

    def weights(self, averaged: bool = False) -> dict[str, torch.Tensor]:
        return {
            name: tensor.clone()
            for bucket in self.student.hf_tensors(EXPORT_BUCKET, averaged=averaged)
            for name, tensor in bucket
        }

    def round_trip(self) -> dict[str, Any]:
        buckets = [
            [(name, tensor.clone()) for name, tensor in bucket]
            for bucket in self.student.hf_tensors(EXPORT_BUCKET)
        ]
        counts: list[Any] = [None] * self.layout.world_size
        dist.all_gather_object(counts, len(buckets))
        self.student.export_hf(self.folder / f"{self.case.name}_exported")
        return {
            "tensors": dict(pair for bucket in buckets for pair in bucket),
            "bucket_bytes": [sum(tensor.nbytes for _, tensor in bucket) for bucket in buckets],
            "bucket_counts": counts,
        }

    def resume(self) -> dict[str, Any]:
        directory = self.folder / f"{self.case.name}{CHECKPOINT_SUFFIX}"
        straight = [self.update(self.student, step) for step in range(4)]
        straight_weights = self.weights()
        first = self.build()
        first.load_hf(self.config.model_path)
        resumed = [self.update(first, step) for step in range(2)]
        for step in (1, 2, 3):
            first.save_checkpoint(directory, step, {"step": step, "note": "kept"}, keep=2)
        names = sorted(path.name for path in directory.iterdir())
        # A crash in the middle of a later save leaves a folder under a temporary name.
        if self.layout.rank == 0:
            shutil.copytree(directory / "step_00000003", directory / ".step_00000009.tmp")
        self.student = self.build()
        progress = self.student.load_checkpoint(directory)
        resumed += [self.update(self.student, step) for step in range(2, 4)]
        return {
            "straight": straight,
            "straight_weights": straight_weights,
            "resumed": resumed,
            "resumed_weights": self.weights(),
            "progress": progress,
            "names": names,
            "nothing": self.student.load_checkpoint(self.folder / "no_such_directory"),
        }

    def load_checkpoint(self) -> dict[str, Any]:
        (directory,) = self.folder.glob(f"resume_{self.case.model}*{CHECKPOINT_SUFFIX}")
        self.student = self.build()
        self.student.load_checkpoint(directory)
        return {
            "results": [self.update(self.student, step) for step in range(2, 4)],
            "weights": self.weights(),
        }

    def average(self) -> dict[str, Any]:
        directory = self.folder / f"{self.case.name}{CHECKPOINT_SUFFIX}"
        self.student = self.build(AVERAGE_DECAY)
        self.student.load_hf(self.config.model_path)
        history = [self.weights()]
        for step in range(3):
            if step == 2:
                self.student.save_checkpoint(directory, step, {})
            self.update(self.student, step)
            history.append(self.weights())
        straight = self.weights(averaged=True)
        return {"history": history, "straight": straight, **self._continue_average(directory)}

    def load_average(self) -> dict[str, Any]:
        (directory,) = self.folder.glob(f"*average{CHECKPOINT_SUFFIX}")
        return self._continue_average(directory)

    def _continue_average(self, directory: Path) -> dict[str, Any]:
        self.student = self.build(AVERAGE_DECAY)
        self.student.load_checkpoint(directory)
        self.update(self.student, 2)
        return {"resumed": self.weights(averaged=True)}

    def refuse_average(self) -> dict[str, Any]:
        without, average = self.folder / "without_average", self.folder / "with_average"
        self.build().save_checkpoint(without, 1, {})
        self.student.save_checkpoint(average, 1, {"note": "kept"})
        try:
            self.student.load_checkpoint(without)
            refusal = ""
        except ConfigError as error:
            refusal = str(error)
        return {"refusal": refusal, "progress": self.build().load_checkpoint(average)}

    def train(self) -> dict[str, Any]:
        results = [self.student.train_sft_mini_batch(self.micro_batches) for _ in range(3)]
        return {"results": results, "weights": self.weights()}

    def update(self, student: Student, step: int) -> Any:
        if step % 2:
            return student.train_sft_mini_batch(self.micro_batches)
        return student.train_mini_batch(self.micro_batches, OBJECTIVE)

    def empty(self) -> dict[str, Any]:
        before = self.weights()
        result = self.student.train_sft_mini_batch([[make_examples()[2]], []])
        logprobs = self.student.compute_logprobs([[]])
        after = self.weights()
        same = all(torch.equal(before[name], after[name]) for name in before)
        return {"result": result, "logprobs": logprobs, "weights_kept": same}

    def exchange(self) -> dict[str, Any]:
        group, rank = self.layout.world_group, self.layout.rank
        examples = broadcast_from_rank0(make_examples() if rank == 0 else None, group)
        nothing: Any = broadcast_from_rank0(None, group)
        received: list[Any] = [None] * self.layout.world_size
        dist.all_gather_object(received, (examples, nothing))
        mine = [np.full(rank + n, rank + n / 4, np.float32) for n in range(rank + 1)]
        gathered = gather_to_rank0(mine if rank else None, group)
        return {"received": received, "gathered": gathered, "seconds": self._impatience()}

    def _impatience(self) -> float:
        """How long rank 1 waits for a late rank 0 with a timeout of one second."""
        group = dist.new_group([0, 1], backend="gloo", timeout=timedelta(seconds=60))
        started = time.monotonic()
        waited = torch.zeros(1)
        if self.layout.rank == 1:
            try:
                broadcast_from_rank0(None, group, timedelta(seconds=1))
            except RuntimeError:
                waited[0] = time.monotonic() - started
        dist.all_reduce(waited)
        return float(waited)


if __name__ == "__main__":
    main()
