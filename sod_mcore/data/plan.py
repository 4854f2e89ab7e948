"""Decides which trajectories form a mini-batch, and where each of them is computed.

Mini-batches are sets of whole groups, drawn by seed alone, so results do not depend on how many
replicas there are or in what order trajectories arrived. Inside a mini-batch, trajectories are
spread over data-parallel replicas by tokens and packed into micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

MicroBatch = tuple[int, ...]
"""Indices of trajectories that are computed together; may be empty."""
Packing = Literal["packed", "padded"]


@dataclass(frozen=True)
class MiniBatch:
    """The trajectories of one optimizer update.

    Attributes:
        replicas: for each data-parallel replica its micro-batches; every replica has the same
            number of them, filled up with empty ones.
        num_loss_tokens: mask-1 tokens of all trajectories: the loss's normaliser. May be 0; then
            there is nothing to update on.
    """

    replicas: tuple[tuple[MicroBatch, ...], ...]
    num_loss_tokens: int

    @property
    def trajectories(self) -> tuple[int, ...]:
        """The indices of all trajectories, ascending."""
        return tuple(sorted(i for replica in self.replicas for micro in replica for i in micro))

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each replica."""
        return len(self.replicas[0])


@dataclass(frozen=True)
class Plan:
    """The optimizer updates of one training step, in order."""

    mini_batches: tuple[MiniBatch, ...]


def make_plan(
    lengths: Sequence[int],
    num_loss_tokens: Sequence[int],
    group_ids: Sequence[str],
    *,
    prompts_per_mini_batch: int,
    epochs: int,
    seed: int | Sequence[int],
    data_parallel_size: int,
    micro_batch_tokens: int,
    packing: Packing,
) -> Plan:
    """The plan of one training step.

    Args:
        lengths: tokens of each trajectory, as they count in a micro-batch (rounded up by the
            caller where a layout needs multiples).
        num_loss_tokens: mask-1 tokens of each trajectory.
        group_ids: group of each trajectory; a group is never split.
        prompts_per_mini_batch: groups in a mini-batch; the last one of an epoch may have fewer.
        epochs: passes over all trajectories; mini-batches are drawn anew in each.
        seed: seeds the draw; give (run seed, step) so that every step draws its own.
        data_parallel_size: replicas.
        micro_batch_tokens: most tokens in a micro-batch, padding included; a longer trajectory
            gets one of its own.
        packing: "packed" counts the sum of lengths, "padded" the longest length times the number.

    Raises:
        ValueError: sequences of different length, or a count that is not positive.
    """
    if not len(lengths) == len(num_loss_tokens) == len(group_ids):
        raise ValueError(
            f"{len(lengths)} lengths, {len(num_loss_tokens)} num_loss_tokens and {len(group_ids)} "
            "group_ids; one of each is needed for every trajectory"
        )
    for name, value in (
        ("prompts_per_mini_batch", prompts_per_mini_batch),
        ("epochs", epochs),
        ("data_parallel_size", data_parallel_size),
        ("micro_batch_tokens", micro_batch_tokens),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is needed")
    seeds = [seed] if isinstance(seed, int) else list(seed)
    mini_batches = []
    for epoch in range(epochs):
        for members in _draw(group_ids, prompts_per_mini_batch, [*seeds, epoch]):
            replicas = _balance(members, lengths, data_parallel_size)
            micro = [_pack(r, lengths, micro_batch_tokens, packing) for r in replicas]
            num_micro = max(map(len, micro))
            filled = tuple((*m, *[()] * (num_micro - len(m))) for m in micro)
            mini_batches.append(MiniBatch(filled, sum(num_loss_tokens[i] for i in members)))
    return Plan(tuple(mini_batches))


def _draw(group_ids: Sequence[str], groups_each: int, seeds: Sequence[int]) -> list[list[int]]:
    """The trajectories of each mini-batch. Sorted first: arrival order must not matter."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(group_ids):
        members.setdefault(group, []).append(index)
    groups = sorted(members)
    order = np.random.default_rng(seeds).permutation(len(groups))
    return [
        [i for g in order[start : start + groups_each] for i in members[groups[g]]]
        for start in range(0, len(groups), groups_each)
    ]


def _balance(members: Sequence[int], lengths: Sequence[int], num_replicas: int) -> list[list[int]]:
    """Longest first, each to the replica with the fewest tokens so far.

    Replicas then differ by at most one longest trajectory.
    """
    replicas: list[list[int]] = [[] for _ in range(num_replicas)]
    tokens = [0] * num_replicas
    for index in _longest_first(members, lengths):
        target = tokens.index(min(tokens))
        replicas[target].append(index)
        tokens[target] += lengths[index]
    return replicas


def _pack(
    members: Sequence[int], lengths: Sequence[int], capacity: int, packing: Packing
) -> list[MicroBatch]:
    """First fit, longest first; a padded row counts as the longest one of its micro-batch."""
    bins: list[list[int]] = []
    costs: list[int] = []
    for index in _longest_first(members, lengths):
        for number, content in enumerate(bins):
            row = lengths[content[0]] if packing == "padded" else lengths[index]
            if costs[number] + row <= capacity:
                content.append(index)
                costs[number] += row
                break
        else:
            bins.append([index])
            costs.append(lengths[index])
    return [tuple(content) for content in bins]


def _longest_first(members: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(members, key=lambda index: (-lengths[index], index))
