"""The order in which items are drawn: a function of seed and step, so resume needs no state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class EpochOrder:
    """Draws batches of distinct items, reshuffled every epoch.

    An epoch has ``num_items // size`` batches; the few items left over are others in each epoch.
    So a batch never holds an item twice.
    """

    num_items: int
    seed: int

    def batch(self, step: int, size: int) -> list[int]:
        """Indices of the ``size`` items of ``step`` (0, 1, ...).

        Raises:
            ValueError: there are fewer than ``size`` items.
        """
        if not 1 <= size <= self.num_items:
            raise ValueError(
                f"a batch of {size} items cannot be drawn from {self.num_items}: give a batch size "
                f"from 1 to {self.num_items}, or more data"
            )
        epoch, position = divmod(step, self.num_items // size)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_items)
        return [int(index) for index in order[position * size : (position + 1) * size]]
