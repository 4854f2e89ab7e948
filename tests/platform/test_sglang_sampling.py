"""The sampling for SGLang on a CPU draws from the distribution that it is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.platform.test_sglang_attention import load_bridge_module

sampling: Any = load_bridge_module("inverse_sampling")
DRAWS = 200_000


def test_frequencies_are_the_probabilities() -> None:
    torch.manual_seed(0)
    probs = torch.softmax(2 * torch.randn(40), dim=0)
    drawn = sampling.draw(probs.expand(DRAWS, -1))
    assert drawn.dtype == torch.int32
    counts = torch.bincount(drawn.long(), minlength=40).double()
    expected = probs.double() * DRAWS
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 80, "39 degrees of freedom: above 80 once in ten thousand"


def test_each_row_has_its_own_distribution() -> None:
    probs = torch.eye(30)[torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    assert sampling.draw(probs).tolist() == probs.argmax(dim=1).tolist()


def test_impossible_tokens_are_never_drawn() -> None:
    probs = torch.zeros(DRAWS, 9)
    probs[:, [2, 5]] = torch.tensor([3e-9, 1e-9])
    assert set(sampling.draw(probs).tolist()) == {2, 5}


def test_rows_are_drawn_independently() -> None:
    drawn = sampling.draw(torch.full((DRAWS, 2), 0.5)).double()
    assert abs(float((drawn[1:] * drawn[:-1]).mean()) - 0.25) < 0.01


def test_seeded_sampling_stays_the_original() -> None:
    def original(probs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> str:
        return "original"

    module = SimpleNamespace(sampling_from_probs_torch=original)
    sampling.install(module)
    probs = torch.ones(1, 4)
    assert module.sampling_from_probs_torch(probs, torch.zeros(1), None) == "original"
    assert module.sampling_from_probs_torch(probs).shape == (1,)
