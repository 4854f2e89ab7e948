"""The compiled kernels as functions on tensors: allocate the outputs, pass the pointers.

Each function is one kernel. Tensors were checked by :mod:`sod_mcore.ops.arguments`; what is made
here keeps alive whatever a kernel reads until the call has returned or, on CUDA, was put on the
stream of the allocator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sod_mcore.ops.arguments import LossInputs
from sod_mcore.ops.objective import Objective
from sod_mcore.ops.result import StepWeightedKL
from sod_mcore.ops.vocab_shard import VocabShard

TERM_NAMES = ("policy", "k2", "k3", "topk", "entropy")
"""Rows of ``TokenLoss.terms``, as csrc/kernels.h orders them."""


@dataclass(frozen=True)
class TokenIds:
    """Targets ``[N]`` and, where asked for, top-K ids and the teacher's log-probs ``[N, K]``."""

    targets: Tensor
    topk_ids: Tensor | None = None
    teacher_topk_logprobs: Tensor | None = None

    @classmethod
    def of(cls, inputs: LossInputs) -> TokenIds:
        """Those of a loss, in C order."""
        ids = None if inputs.teacher_topk_ids is None else inputs.teacher_topk_ids.contiguous()
        return cls(inputs.targets.contiguous(), ids, _contiguous(inputs.teacher_topk_logprobs))

    @property
    def num_topk(self) -> int:
        """K."""
        return 0 if self.topk_ids is None else self.topk_ids.shape[1]

    def rows(self, rows: slice) -> TokenIds:
        """Those of some rows."""
        return TokenIds(
            self.targets[rows],
            None if self.topk_ids is None else self.topk_ids[rows],
            None if self.teacher_topk_logprobs is None else self.teacher_topk_logprobs[rows],
        )


@dataclass(frozen=True)
class TokenLoss:
    """What the coefficient step makes of the statistics; float32."""

    token_loss: Tensor  # [N]
    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    ratio: Tensor  # [N]
    is_clipped: Tensor  # [N] bool
    terms: Tensor  # [5, N]
    topk_logprobs: Tensor | None  # [N, K]

    @property
    def reported(self) -> tuple[Tensor | None, ...]:
        """All but the loss, in the order of :class:`StepWeightedKL`."""
        return (
            self.logprobs,
            self.entropy,
            self.ratio,
            self.is_clipped,
            self.terms,
            self.topk_logprobs,
        )


@dataclass(frozen=True)
class GradientCoefficients:
    """All that the gradient needs beside the logits and the ids: O(N K)."""

    dense: Tensor  # [N, 3] maximum, alpha, beta: see csrc/row_math.h
    sparse: Tensor  # [N, 1 + K] final values at the target and the top-K ids


@dataclass(frozen=True)
class Kernels:
    """The extension for one device, temperature and vocabulary shard."""

    extension: ModuleType
    shard: VocabShard
    inverse_temperature: float

    def statistics(self, logits: Tensor, ids: TokenIds) -> Tensor:
        """Read the logits once: float32 ``[N, 3 tp + 1 + K]``, to be summed over the group."""
        rank, world_size = _position(self.shard.group)
        width = 3 * world_size + 1 + ids.num_topk
        statistics = logits.new_empty(logits.shape[0], width, dtype=torch.float32)
        if logits.shape[0]:
            with self._place(logits) as place:
                place.row_statistics(
                    self._shard(logits),
                    self._ids(ids),
                    rank=rank,
                    world_size=world_size,
                    statistics=statistics.data_ptr(),
                )
        return statistics

    def summed_statistics(self, logits: Tensor, ids: TokenIds) -> Tensor:
        """:meth:`statistics`, summed over the tensor-parallel group in one collective."""
        statistics = self.statistics(logits, ids)
        if self.shard.group is not None:
            dist.all_reduce(statistics, group=self.shard.group)
        return statistics

    def token_loss(
        self,
        statistics: Tensor,
        ids: TokenIds,
        objective: Objective,
        inputs: LossInputs | None,
    ) -> tuple[TokenLoss, GradientCoefficients]:
        """The loss of every row, from summed statistics; without inputs, log-probs and entropy."""
        num_rows = statistics.shape[0]
        empty = statistics.new_empty
        result = TokenLoss(
            token_loss=empty(num_rows),
            logprobs=empty(num_rows),
            entropy=empty(num_rows),
            ratio=empty(num_rows),
            is_clipped=empty(num_rows, dtype=torch.bool),
            terms=empty(len(TERM_NAMES), num_rows),
            topk_logprobs=None if ids.topk_ids is None else empty(num_rows, ids.num_topk),
        )
        coefficients = GradientCoefficients(
            dense=empty(num_rows, 3), sparse=empty(num_rows, 1 + ids.num_topk)
        )
        values = [
            _contiguous(None if inputs is None else getattr(inputs, name))
            for name in ("token_weights", "advantages", "old_logprobs", "teacher_logprobs")
        ]
        if num_rows:
            weights, advantages, old_logprobs, teacher_logprobs = map(_address, values)
            with self._place(statistics) as place:
                place.token_loss(
                    self._ids(ids),
                    self._objective(objective, has_loss=inputs is not None),
                    num_rows=num_rows,
                    world_size=_position(self.shard.group)[1],
                    inverse_temperature=self.inverse_temperature,
                    statistics=statistics.data_ptr(),
                    token_weights=weights,
                    advantages=advantages,
                    old_logprobs=old_logprobs,
                    teacher_logprobs=teacher_logprobs,
                    token_loss=result.token_loss.data_ptr(),
                    logprobs=result.logprobs.data_ptr(),
                    entropy=result.entropy.data_ptr(),
                    ratio=result.ratio.data_ptr(),
                    is_clipped=result.is_clipped.data_ptr(),
                    terms=result.terms.data_ptr(),
                    topk_logprobs=_address(result.topk_logprobs),
                    row_coefficients=coefficients.dense.data_ptr(),
                    sparse_gradient=coefficients.sparse.data_ptr(),
                )
        return result, coefficients

    def logprob_coefficients(
        self,
        statistics: Tensor,
        ids: TokenIds,
        logprob_gradient: Tensor | None,
        entropy_gradient: Tensor | None,
    ) -> GradientCoefficients:
        """Coefficients for given gradients ``[N]`` of log-probs and entropies."""
        num_rows = statistics.shape[0]
        result = GradientCoefficients(
            dense=statistics.new_empty(num_rows, 3), sparse=statistics.new_empty(num_rows, 1)
        )
        gradients = [_contiguous(logprob_gradient), _contiguous(entropy_gradient)]
        if num_rows:
            with self._place(statistics) as place:
                place.logprob_gradient(
                    self._ids(ids),
                    num_rows=num_rows,
                    world_size=_position(self.shard.group)[1],
                    inverse_temperature=self.inverse_temperature,
                    statistics=statistics.data_ptr(),
                    logprob_gradient=_address(gradients[0]),
                    entropy_gradient=_address(gradients[1]),
                    row_coefficients=result.dense.data_ptr(),
                    sparse_gradient=result.sparse.data_ptr(),
                )
        return result

    def write_gradient(
        self,
        logits: Tensor,
        ids: TokenIds,
        coefficients: GradientCoefficients,
        upstream: Tensor | None,
        gradient: Tensor,
    ) -> None:
        """Read the logits once more and write their gradient, which may be their own memory.

        Args:
            upstream: ``[N]`` float32 gradient of each row's loss; None for 1. An expanded tensor
                (one value for all rows) is not copied.
        """
        if not logits.shape[0]:
            return
        stride = 0 if upstream is None else upstream.stride(0)
        with self._place(logits) as place:
            place.logits_gradient(
                self._shard(logits),
                self._ids(ids),
                row_coefficients=coefficients.dense.data_ptr(),
                sparse_gradient=coefficients.sparse.data_ptr(),
                upstream=_address(upstream),
                upstream_stride=stride,
                gradient=gradient.data_ptr(),
                gradient_row_stride=gradient.stride(0),
            )

    @contextmanager
    def _place(self, tensor: Tensor) -> Iterator[Any]:
        """Where the kernels run: as many threads as torch uses, or torch's current stream."""
        if tensor.device.type != "cuda":
            yield self.extension.Cpu(num_threads=torch.get_num_threads())
            return
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        with torch.cuda.device(tensor.device):  # a launch goes to the thread's current device
            yield self.extension.Cuda(stream=stream)

    def _shard(self, logits: Tensor) -> Any:
        return self.extension.Shard(
            logits=logits.data_ptr(),
            is_bfloat16=logits.dtype == torch.bfloat16,
            num_rows=logits.shape[0],
            width=logits.shape[1],
            row_stride=logits.stride(0),
            num_valid_columns=self.shard.num_valid_columns,
            first_column=self.shard.start,
            inverse_temperature=self.inverse_temperature,
        )

    def _ids(self, ids: TokenIds) -> Any:
        return self.extension.TokenIds(
            targets=ids.targets.data_ptr(),
            targets_are_64_bit=ids.targets.dtype == torch.int64,
            topk_ids=_address(ids.topk_ids),
            topk_ids_are_64_bit=ids.topk_ids is not None and ids.topk_ids.dtype == torch.int64,
            num_topk=ids.num_topk,
            teacher_topk_logprobs=_address(ids.teacher_topk_logprobs),
        )

    def _objective(self, objective: Objective, *, has_loss: bool) -> Any:
        return self.extension.Objective(
            policy_coefficient=objective.policy_coefficient if has_loss else 0.0,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            dual_clip=objective.dual_clip,
            k2_coefficient=objective.k2_coefficient if has_loss else 0.0,
            k3_coefficient=objective.k3_coefficient if has_loss else 0.0,
            topk_divergence=objective.topk_divergence,
            topk_coefficient=objective.topk_coefficient if has_loss else 0.0,
            jsd_beta=objective.jsd_beta,
            entropy_coefficient=objective.entropy_coefficient if has_loss else 0.0,
        )


def result_of(outputs: Sequence[Tensor], objective: Objective) -> StepWeightedKL:
    """From an autograd function's outputs: the token losses, then :attr:`TokenLoss.reported`."""
    token_loss, logprobs, entropy, ratio, is_clipped, terms, topk_logprobs = outputs
    return StepWeightedKL(
        token_loss=token_loss,
        logprobs=logprobs,
        entropy=entropy,
        ratio=ratio,
        is_clipped=is_clipped,
        terms=_named_terms(terms, objective),
        topk_logprobs=topk_logprobs,
    )


def _named_terms(terms: Tensor, objective: Objective) -> dict[str, Tensor]:
    """Rows of ``TokenLoss.terms`` whose coefficient is not 0, under their public names."""
    coefficients = (
        objective.policy_coefficient,
        objective.k2_coefficient,
        objective.k3_coefficient,
        objective.topk_coefficient,
        objective.entropy_coefficient,
    )
    named = {}
    for name, coefficient, values in zip(TERM_NAMES, coefficients, terms.unbind(), strict=True):
        if coefficient:
            named[f"topk_{objective.topk_divergence}" if name == "topk" else name] = values
    return named


def _position(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and size."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()
