"""The operations on vocabulary-sized logits.

:mod:`sod_mcore.ops.reference` defines each in eager torch; :mod:`sod_mcore.ops.fused` computes the
same with the C++ and CUDA kernels of csrc/. The names here take the fused one where the extension
was built for the logits' device (``python -m sod_mcore.ops`` tells), and SOD_OPS decides otherwise.
"""

from sod_mcore.ops.dispatch import (
    linear_step_weighted_kl,
    linear_vocab_parallel_logprobs,
    step_weighted_kl,
    vocab_parallel_logprobs,
)
from sod_mcore.ops.objective import Objective
from sod_mcore.ops.result import StepWeightedKL

__all__ = [
    "Objective",
    "StepWeightedKL",
    "linear_step_weighted_kl",
    "linear_vocab_parallel_logprobs",
    "step_weighted_kl",
    "vocab_parallel_logprobs",
]
