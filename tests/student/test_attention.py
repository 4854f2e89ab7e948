"""SDPAttention against softmax written out, one sequence and one head at a time."""

from __future__ import annotations

import torch

from sod_mcore.student.attention import SDPAttention, describe_packed_row
from sod_mcore.student.model_config import TransformerConfig

CPU = torch.device("cpu")
HEADS, GROUPS, WIDTH = 4, 2, 8


def attention() -> SDPAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=WIDTH,
    )
    return SDPAttention(config)


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``[t, heads, d]`` and ``[t, groups, d]`` of one sequence -> ``[t, heads * d]``."""
    heads = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores = query[:, head] @ key[:, group].T / WIDTH**0.5
        later = torch.ones_like(scores).triu(1).bool()
        heads.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ value[:, group])
    return torch.cat(heads, dim=-1)


def random_tensors(*leading: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(*leading, HEADS, WIDTH, dtype=torch.float64, requires_grad=True),
        torch.randn(*leading, GROUPS, WIDTH, dtype=torch.float64, requires_grad=True),
        torch.randn(*leading, GROUPS, WIDTH, dtype=torch.float64, requires_grad=True),
    )


def test_padded_rows() -> None:
    query, key, value = random_tensors(7, 3)
    output = attention()(query, key, value, None)
    for row in range(3):
        expected = written_out(query[:, row], key[:, row], value[:, row])
        torch.testing.assert_close(output[:, row], expected)


def test_packed_sequences_of_all_lengths_do_not_see_each_other() -> None:
    lengths = [5, 1, 17, 2, 2, 9, 8, 16, 1, 3]
    query, key, value = random_tensors(sum(lengths))
    row = describe_packed_row(lengths, CPU)
    assert len(row.length_groups) == 6  # 1, 2, 3-4, 5-8, 9-16, 17-32
    output = attention()(query, key, value, None, packed_seq_params=row)
    weights = torch.randn_like(output)
    ours = torch.autograd.grad((output * weights).sum(), (query, key, value))
    parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    expected = torch.cat([written_out(*part) for part in parts])
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(ours, theirs)


def test_less_than_half_of_a_length_group_is_padding() -> None:
    row = describe_packed_row([100, 1, 64, 3, 65, 2, 128, 5], CPU)
    for group in row.length_groups:
        assert 2 * len(group.rows) > len(group.gather)
