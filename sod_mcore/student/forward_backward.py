"""Run Megatron's schedules over a replica's micro-batches: training, and log-probs alone.

The schedule (1F1B over pipeline stages, or a plain loop) is Megatron's. Losses are sums over
tokens; ``finalize_model_grads`` divides the gradients by the number of loss tokens of the whole
mini-batch over all replicas and micro-batches (``calculate_per_token_loss``), so the result depends
neither on how trajectories are spread over replicas nor on how they are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray

from sod_mcore import ops
from sod_mcore.student.examples import TrainingExample
from sod_mcore.student.output import OutputContext, token_logprobs, token_losses
from sod_mcore.student.output_head import OutputHead
from sod_mcore.student.packing import Packing, pack_micro_batch, split_by_example
from sod_mcore.student.parallel_state import ParallelLayout

MicroBatches = Sequence[Sequence[TrainingExample]]
TokenFunction = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """A model and how its micro-batches are laid out.

    Attributes:
        vocab_size: number of real tokens.
        packing: how trajectories share a micro-batch.
        length_multiple: see :func:`sod_mcore.student.packing.pack_micro_batch`.
        head: output layer and loss.
    """

    model: DistributedDataParallel
    layout: ParallelLayout
    vocab_size: int
    packing: Packing
    length_multiple: int
    head: OutputHead

    def accumulate_gradients(
        self, micro_batches: MicroBatches, objective: ops.Objective | None
    ) -> dict[str, float]:
        """Forward and backward over all micro-batches; leaves reduced, normalised gradients.

        Args:
            micro_batches: this replica's; every replica must have the same number of them, and
                the mini-batch must hold at least one loss token over all replicas.
            objective: the loss; None for cross-entropy.

        Returns:
            sums over this replica's loss tokens on the last stage (see :class:`OutputContext`);
            empty elsewhere.
        """
        processor = token_logprobs if objective is None else token_losses
        loss_function = _negative_sum if objective is None else _sum
        stored = self._run(micro_batches, processor, loss_function, objective, forward_only=False)
        totals: dict[str, torch.Tensor] = {}
        for sums in stored:
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value.double()
        return {name: float(value) for name, value in totals.items()}

    def compute_logprobs(self, micro_batches: MicroBatches) -> list[NDArray[np.float32]] | None:
        """Log-probs of the loss tokens, without gradient.

        Returns:
            on the last stage, float32 ``[T]`` for each trajectory in order, NaN outside the mask;
            None on other stages.
        """
        self.model.eval()
        with torch.no_grad():
            stored = self._run(micro_batches, token_logprobs, _keep, None, forward_only=True)
        self.model.train()
        if not self.layout.is_last_stage:
            return None
        return [
            whole
            for values, examples in zip(stored, micro_batches, strict=True)
            for whole in split_by_example(values.cpu().numpy(), examples)
        ]

    def _run(
        self,
        micro_batches: MicroBatches,
        processor: TokenFunction,
        loss_function: Callable[..., Any],
        objective: ops.Objective | None,
        *,
        forward_only: bool,
    ) -> list[Any]:
        for micro_batch in micro_batches:
            for example in micro_batch:
                example.check_values(self.vocab_size)

        def forward_step(
            iterator: Iterator[Sequence[TrainingExample]], model: DistributedDataParallel
        ) -> tuple[torch.Tensor, Callable[..., Any]]:
            micro_batch = pack_micro_batch(
                next(iterator),
                packing=self.packing,
                device=self.layout.device,
                length_multiple=self.length_multiple,
            )
            context = OutputContext(
                loss_rows=micro_batch.loss_rows,
                vocab_size=self.vocab_size,
                group=mpu.get_tensor_model_parallel_group(),
                head=self.head,
                objective=objective,
            )
            output = model(
                micro_batch.token_ids,
                micro_batch.position_ids,
                None,
                packed_seq_params=micro_batch.packed_row,
                output_processor=processor,
                output_processor_context=context,
            )
            return output, partial(loss_function, context)

        stored: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[self.model],
            num_microbatches=len(micro_batches),
            seq_length=self.length_multiple,  # stages tell each other the true lengths
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return stored


def _sum(
    context: OutputContext, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    num_tokens = torch.tensor(len(context.loss_rows), dtype=torch.int, device=values.device)
    return values.sum(), num_tokens, context.sums


def _negative_sum(
    context: OutputContext, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    return _sum(context, -values)


def _keep(context: OutputContext, values: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
    return values
