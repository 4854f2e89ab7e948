"""The compiled row statistics against float64 eager, and their merge over shards."""

import math

import pytest
import torch

from sod_mcore.ops import vocab_parallel_logprobs
from sod_mcore.ops.row_statistics import RowStatistics, merge_row_statistics, row_statistics


def make_logits(num_rows: int, width: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows * 1000 + width)
    return scale * torch.randn(num_rows, width, generator=generator)


def check(statistics: RowStatistics, logits: torch.Tensor, temperature: float = 1.0) -> None:
    """Compare with softmax statistics of whole rows in float64."""
    logprobs = (logits.double() / temperature).log_softmax(-1)
    normalizer = (logits.double() / temperature).logsumexp(-1)
    entropy = -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(-1)
    torch.testing.assert_close(statistics.log_normalizer, normalizer, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(statistics.entropy, entropy, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 17), (2, 5000)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_equals_float64_eager(
    dtype: torch.dtype, shape: tuple[int, int], temperature: float
) -> None:
    logits = make_logits(*shape).to(dtype)
    check(row_statistics(logits, temperature=temperature), logits, temperature)


def test_a_long_row_keeps_its_digits() -> None:
    logits = make_logits(2, 151_936, scale=5.0)
    check(row_statistics(logits), logits)


def test_padding_is_never_read() -> None:
    logits = make_logits(3, 40)
    logits[:, 33:] = math.nan
    check(row_statistics(logits, num_valid_columns=33), logits[:, :33])


def test_columns_at_minus_infinity_have_no_probability() -> None:
    logits = make_logits(3, 20)
    logits[:, ::3] = -math.inf
    check(row_statistics(logits), logits)


def test_nan_is_passed_on() -> None:
    logits = make_logits(2, 9)
    logits[1, 4] = math.nan
    statistics = row_statistics(logits)
    assert statistics.log_normalizer.isnan().tolist() == [False, True]
    assert statistics.entropy.isnan().tolist() == [False, True]


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [21, 37, 48])
def test_shards_merge_to_the_eager_operation(num_shards: int, vocab_size: int) -> None:
    logits = make_logits(5, 48)
    width = 48 // num_shards
    shards = [
        row_statistics(
            shard.contiguous(), num_valid_columns=min(max(vocab_size - rank * width, 0), width)
        )
        for rank, shard in enumerate(logits.chunk(num_shards, dim=1))
    ]
    merged = merge_row_statistics(shards)
    check(merged, logits[:, :vocab_size])
    targets = torch.arange(5)
    logprobs, entropy = vocab_parallel_logprobs(logits, targets, vocab_size=vocab_size)
    sampled = logits.gather(1, targets[:, None])[:, 0].double() - merged.log_normalizer
    torch.testing.assert_close(sampled.float(), logprobs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.entropy.float(), entropy, rtol=1e-5, atol=1e-6)


def test_unfit_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        row_statistics(torch.zeros(2, 3).double())
    with pytest.raises(ValueError, match="contiguous"):
        row_statistics(torch.zeros(3, 2).T)
    with pytest.raises(ValueError, match="logits has 1 dimensions"):
        row_statistics(torch.zeros(3))
    with pytest.raises(ValueError, match="num_valid_columns=4"):
        row_statistics(torch.zeros(2, 3), num_valid_columns=4)
    with pytest.raises(ValueError, match="must be positive"):
        row_statistics(torch.zeros(2, 3), temperature=math.nan)
