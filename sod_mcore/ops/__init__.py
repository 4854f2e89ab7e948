"""The operations on vocabulary-sized logits, under the names that the trainer uses.

They are the eager implementations of :mod:`sod_mcore.ops.reference` at present; a fused one takes
their place here under the same names and signatures. :mod:`sod_mcore.ops.row_statistics` is the
face of the compiled extension and is imported by name, so that nothing else needs the extension.
"""

from sod_mcore.ops.objective import Objective
from sod_mcore.ops.reference import step_weighted_kl, vocab_parallel_logprobs
from sod_mcore.ops.result import StepWeightedKL

__all__ = ["Objective", "StepWeightedKL", "step_weighted_kl", "vocab_parallel_logprobs"]
