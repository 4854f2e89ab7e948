"""What the operations on logits accept: every argument is checked before any memory is touched.

Shapes, dtypes, devices and layouts are always checked, since that needs no look at the data. Checks
of values (ids inside the vocabulary, finite log-probs) would make the CPU wait for the GPU; they
are made by request, and by the trainer where it assembles the batch on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sod_mcore.ops.objective import Objective
from sod_mcore.ops.vocab_shard import VocabShard

LOGIT_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
KERNEL_DTYPES = (torch.bfloat16, torch.float32)
ID_DTYPES = (torch.int32, torch.int64)
MAX_TOPK = 128
DEFAULT_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class LossInputs:
    """What the loss of each row of the logits is made of; see ``step_weighted_kl`` for each."""

    targets: Tensor  # [N] ids
    token_weights: Tensor  # [N]
    advantages: Tensor  # [N]
    old_logprobs: Tensor  # [N]
    teacher_logprobs: Tensor | None = None  # [N]
    teacher_topk_ids: Tensor | None = None  # [N, K] ids
    teacher_topk_logprobs: Tensor | None = None  # [N, K]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor) and (value is not None or field.default is MISSING):
                raise TypeError(f"{field.name} is a {type(value).__name__}; it must be a tensor")

    def detach(self) -> LossInputs:
        """The same as constants."""
        return self._map(Tensor.detach)

    def rows(self, rows: slice) -> LossInputs:
        """Those of some rows."""
        return self._map(lambda values: values[rows])

    def _map(self, function: Callable[[Tensor], Tensor]) -> LossInputs:
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = None if value is None else function(value)
        return LossInputs(**values)


def check_logprob_arguments(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup | None,
    validate: bool,
) -> VocabShard:
    """Check the arguments of ``vocab_parallel_logprobs``; the columns of this rank.

    Raises:
        ValueError: naming the argument, what it is and what it must be.
    """
    shard = _check_logits(logits, vocab_size, temperature, group)
    _check_ids("targets", targets, logits, (logits.shape[0],))
    if validate:
        shard.require_ids("targets", targets, lowest=-1)
    return shard


def check_loss_arguments(
    logits: Tensor,
    inputs: LossInputs,
    *,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup | None,
    objective: Objective,
    validate: bool,
) -> VocabShard:
    """Check the arguments of ``step_weighted_kl``; the columns of this rank.

    Raises:
        ValueError: naming the argument, what it is and what it must be.
    """
    shard = check_logprob_arguments(
        logits,
        inputs.targets,
        vocab_size=vocab_size,
        temperature=temperature,
        group=group,
        validate=validate,
    )
    for name in ("token_weights", "advantages", "old_logprobs", "teacher_logprobs"):
        values = getattr(inputs, name)
        if values is not None:
            _check_floats(name, values, logits, (logits.shape[0],))
    _check_teacher(inputs, objective)
    ids = inputs.teacher_topk_ids
    if ids is not None:
        if ids.dim() != 2 or ids.shape[1] > MAX_TOPK:
            raise ValueError(
                f"teacher_topk_ids has shape {tuple(ids.shape)}; it must be "
                f"[{logits.shape[0]}, K] with K at most {MAX_TOPK}"
            )
        shape = (logits.shape[0], ids.shape[1])
        _check_ids("teacher_topk_ids", ids, logits, shape)
        if inputs.teacher_topk_logprobs is not None:
            _check_floats("teacher_topk_logprobs", inputs.teacher_topk_logprobs, logits, shape)
    if validate:
        _check_values(inputs, objective, shard)
    return shard


def check_linear_arguments(
    hidden: Tensor, weight: Tensor, chunk_rows: int, logits_dtype: torch.dtype | None
) -> torch.dtype:
    """Check what the operations with an output layer take beside the others; the logits' dtype.

    Raises:
        ValueError: naming the argument, what it is and what it must be.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}; they must be "
            "[N, h] and [V/tp, h]"
        )
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"hidden is {hidden.dtype} on {hidden.device}, weight {weight.dtype} on "
            f"{weight.device}; they must be alike"
        )
    if chunk_rows < 1:
        raise ValueError(
            f"chunk_rows={chunk_rows} must be at least 1; {DEFAULT_CHUNK_ROWS} is the usual value"
        )
    dtype = hidden.dtype if logits_dtype is None else logits_dtype
    if dtype not in (hidden.dtype, torch.float32):
        raise ValueError(
            f"logits_dtype={dtype} must be torch.float32 or that of hidden, {hidden.dtype}"
        )
    return dtype


def _check_logits(
    logits: Tensor, vocab_size: int, temperature: float, group: dist.ProcessGroup | None
) -> VocabShard:
    shard = VocabShard.of(logits, vocab_size, group)
    if logits.dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"logits has dtype {logits.dtype}; it must be torch.bfloat16 or torch.float32, call "
            "bfloat16() or float() on it"
        )
    if not 0.0 < temperature < float("inf"):
        raise ValueError(
            f"temperature={temperature} must be positive and finite; greedy rollouts have no "
            "distribution to train, use 1.0"
        )
    return shard


def check_kernel_dtype(name: str, dtype: torch.dtype) -> None:
    """Check that the kernels can read such logits.

    Raises:
        ValueError: they are neither bf16 nor float32.
    """
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"{name} has dtype {dtype}; the kernels take one of {KERNEL_DTYPES}")


def check_kernel_logits(logits: Tensor, *, overwrite_logits: bool) -> None:
    """Check that the kernels can walk the rows, and write over them if they are to.

    Raises:
        ValueError: another dtype, columns of a row that do not lie side by side, rows that overlap,
            or a leaf (or view of one) that would become its own gradient.
    """
    check_kernel_dtype("logits", logits.dtype)
    source = logits if logits._base is None else logits._base
    if overwrite_logits and source.is_leaf and source.requires_grad:
        raise ValueError(
            "overwrite_logits=True, but logits is a leaf, or a view of one: its values would be "
            "lost to its own gradient; pass what an operation made anew, or overwrite_logits=False"
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(
            f"logits has strides {logits.stride()}; the columns of a row must lie side by side, "
            "call contiguous() on it"
        )
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"logits has strides {logits.stride()}: its rows overlap; call contiguous() on it"
        )


def _check_ids(name: str, ids: Tensor, logits: Tensor, shape: tuple[int, ...]) -> None:
    if ids.dtype not in ID_DTYPES:
        raise ValueError(f"{name} has dtype {ids.dtype}; it must be one of {ID_DTYPES}")
    _check_place(name, ids, logits, shape)


def _check_floats(name: str, values: Tensor, logits: Tensor, shape: tuple[int, ...]) -> None:
    allowed = (torch.float32, torch.float64) if logits.dtype == torch.float64 else (torch.float32,)
    if values.dtype not in allowed:
        raise ValueError(f"{name} has dtype {values.dtype}; it must be one of {allowed}")
    _check_place(name, values, logits, shape)


def _check_place(name: str, values: Tensor, logits: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(values.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; it must be {list(shape)}, one row for each "
            "row of logits"
        )
    if values.device != logits.device:
        raise ValueError(f"{name} is on {values.device}, logits on {logits.device}; move it there")


def _check_teacher(inputs: LossInputs, objective: Objective) -> None:
    if objective.needs_teacher_logprobs and inputs.teacher_logprobs is None:
        raise ValueError(
            "teacher_logprobs is missing; k2_coefficient and k3_coefficient need it, or set them "
            "to 0"
        )
    if inputs.teacher_topk_logprobs is not None and inputs.teacher_topk_ids is None:
        raise ValueError("teacher_topk_logprobs is given without teacher_topk_ids; give both")
    if objective.needs_teacher_topk and inputs.teacher_topk_logprobs is None:
        raise ValueError(
            "teacher_topk_ids and teacher_topk_logprobs are missing; topk_coefficient needs both, "
            "or set it to 0"
        )


def _check_values(inputs: LossInputs, objective: Objective, shard: VocabShard) -> None:
    carries_loss = inputs.targets >= 0
    for name in ("token_weights", "advantages", "old_logprobs"):
        if not bool(torch.isfinite(getattr(inputs, name)[carries_loss]).all()):
            raise ValueError(f"{name} is not finite everywhere; drop the rows that have no value")
    teacher = inputs.teacher_logprobs
    if (
        objective.needs_teacher_logprobs
        and teacher is not None
        and not bool(torch.isfinite(teacher[carries_loss]).all())
    ):
        raise ValueError(
            "teacher_logprobs is not finite everywhere; pass it through "
            "algorithm.floor_logprobs, and drop rows that were not scored"
        )
    ids, logprobs = inputs.teacher_topk_ids, inputs.teacher_topk_logprobs
    if ids is None:
        return
    shard.require_ids("teacher_topk_ids", ids, lowest=-1)
    ordered = ids.sort(dim=1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise ValueError("teacher_topk_ids holds an id twice in one row; ids must be distinct")
    if logprobs is None:
        return
    present = logprobs[ids >= 0]
    if bool((present.isnan() | torch.isposinf(present)).any()):
        raise ValueError(
            "teacher_topk_logprobs holds NaN or +inf at an id that is present; mark an entry that "
            "was not scored with id -1"
        )
