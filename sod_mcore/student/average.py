"""An exponential average of the student's weights, for a teacher that follows the student slowly.

Each rank averages its own shards, so nothing is communicated until the average is exported, which
goes the same way as the weights themselves. It takes 4 bytes a parameter on every replica. A bf16
model's rounded weights are averaged: those that its engines have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from sod_mcore.student.model import sharded_parameters, unwrap

KEY_PREFIX = "average."
"""Before the names of a checkpoint's tensors."""


class WeightAverage:
    """``a <- decay * a + (1 - decay) * w`` after each optimizer update, in float32.

    Args:
        model: this rank's part of the student, wrapped or not.
        decay: share of the old average that stays, between 0 and 1.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        self._values = {
            name: torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
            for name, parameter in unwrap(model).named_parameters()
        }
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Make the current weights the average."""
        for name, parameter in unwrap(self._model).named_parameters():
            self._values[name].copy_(parameter)

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in."""
        for name, parameter in unwrap(self._model).named_parameters():
            self._values[name].lerp_(parameter.float(), 1.0 - self._decay)

    def parameters(self) -> Mapping[str, Tensor]:
        """The average by the model's parameter names, in the model's dtype; each is converted when
        it is asked for."""
        dtype = next(unwrap(self._model).parameters()).dtype
        return _Converted(self._values, dtype)

    def sharded_state(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint keeps: the model's sharded tensors with the average's values."""
        state = sharded_parameters(self._model, metadata)
        return {name: _with_data(state[name], self._values[name]) for name in self._values}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`sharded_state` became when it was loaded."""
        for name, value in self._values.items():
            value.copy_(state[name])


class _Converted(Mapping[str, Tensor]):
    """Tensors in another dtype, one at a time."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _with_data(place: ShardedTensor | ShardedTensorFactory, data: Tensor) -> Any:
    """The place of a parameter among all ranks' shards, with the average's name and values."""
    key = KEY_PREFIX + place.key
    if isinstance(place, ShardedTensorFactory):
        return dataclasses.replace(place, key=key, data=data)
    return dataclasses.replace(place, key=key, data=data, dtype=data.dtype)
