"""The batched attention for SGLang on a CPU against the definition, in float64."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch

from sod_mcore.serving.fleet.launch import CPU_BRIDGE

HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE = 6, 2, 8, 10


def load_bridge_module(name: str) -> ModuleType:
    """Load a file of the bridge the way the engine does: by path, outside of the package."""
    spec = importlib.util.spec_from_file_location(name, CPU_BRIDGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


attention: Any = load_bridge_module("batched_attention")


class Cache:
    """A key-value cache whose sequences lie in shuffled slots, with other values in between."""

    def __init__(self, lengths: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_slots, longest = 2 * sum(lengths) + 8, max(lengths) + 3
        self.keys = torch.randn(num_slots, KEY_VALUE_HEADS, HEAD_SIZE, generator=generator)
        self.values = torch.randn(num_slots, KEY_VALUE_HEADS, VALUE_SIZE, generator=generator)
        self.rows = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
        self.lengths = torch.tensor(lengths)
        free = torch.randperm(num_slots, generator=generator).tolist()
        # What lies behind a sequence's end is left over from earlier requests.
        self.req_to_token = torch.randint(
            num_slots, (len(lengths) + 2, longest), generator=generator, dtype=torch.int32
        )
        for row, length in zip(self.rows.tolist(), lengths, strict=True):
            taken, free = free[:length], free[length:]
            self.req_to_token[row, :length] = torch.tensor(taken, dtype=torch.int32)
        self.generator = generator

    def expected(self, which: int, position: int, query: torch.Tensor) -> torch.Tensor:
        """Softmax attention of one query ``[heads, head_size]`` over positions 0..position."""
        slots = self.req_to_token[self.rows[which], : position + 1].long()
        repeat = HEADS // KEY_VALUE_HEADS
        keys = self.keys[slots].double().repeat_interleave(repeat, dim=1)
        values = self.values[slots].double().repeat_interleave(repeat, dim=1)
        scores = torch.einsum("hd,lhd->hl", query.double(), keys) / HEAD_SIZE**0.5
        return torch.einsum("hl,lhd->hd", scores.softmax(dim=-1), values)


@pytest.mark.parametrize("lengths", [[1], [5, 5], [1, 40, 7, 23], list(range(1, 80))])
def test_decode(lengths: list[int]) -> None:
    cache = Cache(lengths)
    query = torch.randn(len(lengths), HEADS, HEAD_SIZE, generator=cache.generator)
    output = torch.full((len(lengths), HEADS, VALUE_SIZE), torch.nan)
    attention.decode_attention(
        query,
        output,
        cache.keys,
        cache.values,
        cache.req_to_token,
        cache.rows,
        cache.lengths,
        scaling=None,
    )
    for which, length in enumerate(lengths):
        expected = cache.expected(which, length - 1, query[which])
        torch.testing.assert_close(output[which].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cached", [[0, 0, 0], [4, 0, 11], [1, 16, 29]])
def test_extend(cached: list[int]) -> None:
    lengths = [9, 17, 30]
    cache = Cache(lengths, seed=1)
    new = [length - before for length, before in zip(lengths, cached, strict=True)]
    query = torch.randn(sum(new), HEADS, HEAD_SIZE, generator=cache.generator)
    output = torch.full((sum(new), HEADS, VALUE_SIZE), torch.nan)
    attention.extend_attention(
        query,
        output,
        cache.keys,
        cache.values,
        cache.req_to_token,
        cache.rows,
        cache.lengths,
        torch.tensor(cached),
        torch.tensor(new),
        scaling=None,
    )
    row = 0
    for which, (before, length) in enumerate(zip(cached, lengths, strict=True)):
        for position in range(before, length):
            expected = cache.expected(which, position, query[row])
            torch.testing.assert_close(output[row].double(), expected, atol=1e-5, rtol=0)
            row += 1


def test_other_cases_go_to_the_original() -> None:
    class Backend:
        def _run_sdpa_forward_decode(self, *tensors: Any, **options: Any) -> str:
            return "original decode"

        def _run_sdpa_forward_extend(self, *tensors: Any, **options: Any) -> str:
            return "original extend"

    attention.install(Backend)
    backend = Backend()
    arguments = [torch.zeros(0)] * 7
    assert (
        backend._run_sdpa_forward_decode(*arguments, None, sliding_window_size=4)
        == "original decode"
    )
    assert backend._run_sdpa_forward_decode(*arguments, torch.zeros(0)) == "original decode"
    assert backend._run_sdpa_forward_extend(*arguments, None, causal=False) == "original extend"
    assert (
        backend._run_sdpa_forward_extend(*arguments, None, causal=True, is_cross_attn=True)
        == "original extend"
    )
