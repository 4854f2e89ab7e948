"""Which columns of the vocabulary a rank holds, and how global token ids map to them.

Megatron pads the vocabulary so that it divides by the tensor-parallel size. Columns that exist only
as padding lie at the end of the last shards; they never enter a normaliser, an entropy or a
gradient.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Columns ``[start, start + num_columns)`` of the padded vocabulary, split over a group."""

    start: int
    num_columns: int
    num_valid_columns: int  # the leading ones, whose global index is below vocab_size
    vocab_size: int
    group: dist.ProcessGroup | None

    @staticmethod
    def of(logits: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> "VocabShard":
        """The shard of this rank.

        Args:
            logits: ``[N, V/tp]``, equally wide on every rank of the group.
            vocab_size: number of real tokens, at most the padded width.
            group: tensor-parallel group, or None where the logits are whole.

        Raises:
            ValueError: if the logits are no matrix, or too narrow for the vocabulary, or the group
                is another rank's.
        """
        if logits.dim() != 2:
            raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be [N, V/tp]")
        rank = 0 if group is None else dist.get_rank(group)
        world_size = 1 if group is None else dist.get_world_size(group)
        if rank < 0:
            raise ValueError("group has not this rank among its members; pass the rank's own group")
        width = logits.shape[1]
        if not 0 < vocab_size <= width * world_size:
            raise ValueError(
                f"vocab_size={vocab_size} must lie in [1, {width * world_size}], the width of "
                f"logits ({width}) times the ranks of the group ({world_size})"
            )
        start = rank * width
        return VocabShard(
            start=start,
            num_columns=width,
            num_valid_columns=min(max(vocab_size - start, 0), width),
            vocab_size=vocab_size,
            group=group,
        )

    def locate(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Local column of each global id, and whether this rank owns it (else the column is 0)."""
        column = token_ids.long() - self.start
        is_owned = (column >= 0) & (column < self.num_valid_columns)
        return column.masked_fill(~is_owned, 0), is_owned

    def require_ids(self, name: str, token_ids: Tensor, *, lowest: int = 0) -> None:
        """Refuse ids outside ``[lowest, vocab_size)``, which no rank would own.

        Raises:
            ValueError: naming the argument and the first such id.
        """
        bad = (token_ids < lowest) | (token_ids >= self.vocab_size)
        if bool(bad.any()):
            raise ValueError(
                f"{name} holds {int(token_ids[bad][0])}; ids must lie in "
                f"[{lowest}, {self.vocab_size}). Do student, teacher and data share one tokenizer?"
            )


def gather_owned(values: Tensor, column: Tensor, is_owned: Tensor) -> Tensor:
    """``values[n, column[n, k]]`` where owned, else 0: ``[N, V], [N, K], [N, K] -> [N, K]``."""
    if values.shape[1] == 0:
        # A shard of padding alone has no column to point at.
        return values.new_zeros(column.shape)
    return torch.where(is_owned, values.gather(1, column), 0.0)
