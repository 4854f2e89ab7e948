"""Log-softmax statistics of vocabulary shards, computed by the C++ extension on the CPU.

Each row of a shard is summarised by three numbers, and the numbers of all shards give log-probs
and entropies of the whole vocabulary: no copy of the logits is ever made, in float32 or otherwise.
Forward only and single-threaded. Training does not use it; it is an independent check of the eager
operations, and the place where a fused one starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    from sod_mcore.ops import _C
except ImportError as error:
    raise ImportError(
        "sod_mcore.ops._C is not built; install the package with a C++17 compiler at hand: "
        "pip install -e ."
    ) from error


@dataclass(frozen=True)
class RowStatistics:
    """Of each row, with ``u`` the logits over temperature: ``[N]`` each."""

    max: Tensor  # float32, m = max_j u_j; -inf where there is no column
    exp_sum: Tensor  # float64, sum_j exp(u_j - m)
    exp_shifted_sum: Tensor  # float64, sum_j exp(u_j - m) (u_j - m)

    @property
    def log_normalizer(self) -> Tensor:
        """``[N]`` float64, ``log sum_j exp(u_j)``."""
        return self.max.double() + self.exp_sum.log()

    @property
    def entropy(self) -> Tensor:
        """``[N]`` float64, nats."""
        return self.exp_sum.log() - self.exp_shifted_sum / self.exp_sum


def row_statistics(
    logits: Tensor, *, num_valid_columns: int | None = None, temperature: float = 1.0
) -> RowStatistics:
    """Statistics of one shard.

    Args:
        logits: ``[N, V/tp]``, float32 or bfloat16, contiguous, on the CPU.
        num_valid_columns: how many leading columns are no padding; None for all.
        temperature: divides the logits; positive.

    Returns:
        :class:`RowStatistics`, detached.

    Raises:
        ValueError: on another dtype, device, layout or shape, or numbers out of range.
    """
    if logits.device.type != "cpu" or not logits.is_contiguous():
        raise ValueError(
            f"logits is on {logits.device} with strides {logits.stride()}; it must be on the CPU "
            "and contiguous"
        )
    if num_valid_columns is None:
        num_valid_columns = logits.shape[-1]
    logits = logits.detach()
    if logits.dtype == torch.float32:
        values = _C.row_statistics_float32(logits.numpy(), num_valid_columns, temperature)
    elif logits.dtype == torch.bfloat16:
        bits = logits.view(torch.uint16).numpy()
        values = _C.row_statistics_bfloat16(bits, num_valid_columns, temperature)
    else:
        raise ValueError(f"logits has dtype {logits.dtype}; it must be float32 or bfloat16")
    return RowStatistics(*(torch.from_numpy(value) for value in values))


def merge_row_statistics(shards: Sequence[RowStatistics]) -> RowStatistics:
    """Statistics of the whole vocabulary from those of its shards, in any order.

    A shard without columns (``max`` -inf, sums 0) adds nothing.
    """
    maxima = torch.stack([shard.max for shard in shards])
    row_max = maxima.amax(dim=0)
    # exp(-inf) * -inf would be NaN for a shard without columns: its sums are 0 at any shift.
    shift = (maxima - row_max).masked_fill(torch.isneginf(maxima), 0.0).double()
    exp_sum = torch.stack([shard.exp_sum for shard in shards])
    exp_shifted_sum = torch.stack([shard.exp_shifted_sum for shard in shards])
    scale = shift.exp()
    return RowStatistics(
        max=row_max,
        exp_sum=(scale * exp_sum).sum(dim=0),
        exp_shifted_sum=(scale * (exp_shifted_sum + shift * exp_sum)).sum(dim=0),
    )
