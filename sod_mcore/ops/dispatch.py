"""The operations under the names that the trainer uses: fused where the extension can run on the
logits' device, else in eager torch.

float64 logits, which only gradient checks have, always take the eager implementation.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sod_mcore.ops import fused, linear, reference
from sod_mcore.ops.extension import extension_for
from sod_mcore.ops.result import StepWeightedKL


@functools.wraps(reference.vocab_parallel_logprobs)
def vocab_parallel_logprobs(
    logits: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """See the wrapped function."""
    extension = _extension_for(logits)
    if extension is None:
        return reference.vocab_parallel_logprobs(logits, targets, **options)
    return fused.vocab_parallel_logprobs(extension, logits, targets, **options)


@functools.wraps(reference.step_weighted_kl)
def step_weighted_kl(logits: Tensor, targets: Tensor, **options: Any) -> StepWeightedKL:
    """See the wrapped function."""
    extension = _extension_for(logits)
    if extension is None:
        return reference.step_weighted_kl(logits, targets, **options)
    return fused.step_weighted_kl(extension, logits, targets, **options)


@functools.wraps(reference.linear_vocab_parallel_logprobs)
def linear_vocab_parallel_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """See the wrapped function."""
    extension = _extension_for(hidden)
    if extension is None:
        return reference.linear_vocab_parallel_logprobs(hidden, weight, targets, **options)
    return linear.linear_vocab_parallel_logprobs(extension, hidden, weight, targets, **options)


@functools.wraps(reference.linear_step_weighted_kl)
def linear_step_weighted_kl(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> StepWeightedKL:
    """See the wrapped function."""
    extension = _extension_for(hidden)
    if extension is None:
        return reference.linear_step_weighted_kl(hidden, weight, targets, **options)
    return linear.linear_step_weighted_kl(extension, hidden, weight, targets, **options)


def _extension_for(logits: Tensor) -> ModuleType | None:
    return None if logits.dtype == torch.float64 else extension_for(logits.device)
