"""Where the steps of a trajectory are: the unit that step-wise weights are computed on.

A step is one assistant turn (SOD, arXiv 2605.07725, section 3; Eq. 1 writes it y_k).
"""

import torch
from torch import Tensor


def index_steps(loss_mask: Tensor, turn_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Number the steps of every sample.

    With ``turn_index`` a step is a turn that has at least one mask-1 token, in order of the turn
    index: masking some tokens out of the loss never splits or merges steps. Without it a step is a
    maximal run of the mask, which is the same thing as long as the mask is exactly "sampled".

    Args:
        loss_mask: ``[B, T]`` bool (or 0/1 of any dtype).
        turn_index: ``[B, T]`` integers, at least 0 wherever the mask is 1; else ignored.

    Returns:
        ``step_index [B, T]`` int64, 0-based, -1 where the mask is 0, and ``num_steps [B]`` int64.

    Raises:
        ValueError: on shapes that differ, or a negative turn index inside the mask.
    """
    if loss_mask.dim() != 2:
        raise ValueError(f"loss_mask has shape {tuple(loss_mask.shape)}; it must be [B, T]")
    mask = loss_mask.bool()
    if turn_index is None:
        return _index_runs(mask)
    return _index_turns(mask, turn_index)


def _index_runs(mask: Tensor) -> tuple[Tensor, Tensor]:
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    num_steps = starts.sum(dim=1)
    return (starts.cumsum(dim=1) - 1).masked_fill(~mask, -1), num_steps


def _index_turns(mask: Tensor, turn_index: Tensor) -> tuple[Tensor, Tensor]:
    if turn_index.shape != mask.shape:
        raise ValueError(
            f"turn_index has shape {tuple(turn_index.shape)}, loss_mask {tuple(mask.shape)}; "
            "they must be equal"
        )
    turn = turn_index.long().masked_fill(~mask, 0)
    if bool((turn < 0).any()):
        row, column = (turn < 0).nonzero()[0].tolist()
        raise ValueError(
            f"turn_index is {int(turn[row, column])} at ({row}, {column}) where loss_mask is 1; "
            "every token of the loss was sampled in a turn, numbered from 0"
        )
    num_turns = int(turn.max()) + 1 if turn.numel() else 0
    tokens_per_turn = torch.zeros(mask.shape[0], num_turns, dtype=torch.long, device=mask.device)
    tokens_per_turn.scatter_add_(1, turn, mask.long())
    has_tokens = tokens_per_turn > 0
    # A turn whose tokens are all masked takes no number, so that K counts steps and not turns.
    step_of_turn = has_tokens.cumsum(dim=1) - 1
    return step_of_turn.gather(1, turn).masked_fill(~mask, -1), has_tokens.sum(dim=1)
