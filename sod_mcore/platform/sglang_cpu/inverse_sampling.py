"""Draws the next tokens with one random number a sequence, for SGLang on a CPU.

SGLang 0.5.23 calls ``torch.multinomial``, which on a CPU draws an exponential variate for every
entry of the vocabulary, one after the other: a fifth of a decoding step with 1600 tokens and more
with a real vocabulary. Inverting the cumulative distribution draws from the same distribution.
"""

from __future__ import annotations

from typing import Any

import torch


def install(sampler: Any) -> None:
    """Replace ``sampling_from_probs_torch`` of the module ``sglang.srt.layers.sampler``."""
    original = sampler.sampling_from_probs_torch

    def sampling_from_probs_torch(
        probs: torch.Tensor,
        sampling_seed: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if sampling_seed is not None:
            seeded: torch.Tensor = original(probs, sampling_seed, positions)
            return seeded
        return draw(probs)

    sampler.sampling_from_probs_torch = sampling_from_probs_torch


def draw(probs: torch.Tensor) -> torch.Tensor:
    """One index a row of ``probs`` ``[B, vocab]`` (any positive scale) -> int32 ``[B]``."""
    # float64: in float32 the tail of a large vocabulary is lost in the rounding of the sum.
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    threshold = torch.rand_like(total) * total
    index = torch.searchsorted(cumulative, threshold, right=True)
    return index.clamp_(max=probs.shape[-1] - 1).view(-1).to(torch.int32)
