"""Attention of a whole batch at once, for SGLang's ``torch_native`` backend on a CPU.

SGLang 0.5.23 calls torch once a sequence and layer, and for a sequence with a cached prefix it
computes the prefix's queries again and throws the results away. With small models nearly all of a
decoding step is then spent in that loop. These two methods replace those of
``TorchNativeAttnBackend`` in the plain case (a causal decoder without sliding window); every other
case goes to the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

SEQUENCES_A_CALL = 32
"""Sequences of similar length that share one padded block."""


def install(backend: Any) -> None:
    """Replace the two methods of ``TorchNativeAttnBackend``."""
    backend._run_sdpa_forward_decode = _in_the_plain_case(
        decode_attention, backend._run_sdpa_forward_decode
    )
    backend._run_sdpa_forward_extend = _in_the_plain_case(
        extend_attention, backend._run_sdpa_forward_extend
    )


def decode_attention(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of one new token a sequence over everything before it and itself.

    Args:
        query: ``[B, heads, head_size]``.
        output: ``[B, heads, value_size]``, filled in.
        k_cache: ``[slots, key_value_heads, head_size]``.
        v_cache: ``[slots, key_value_heads, value_size]``.
        req_to_token: ``[requests, context]``, the slot of each position.
        req_pool_indices: ``[B]``, the sequences' rows in ``req_to_token``.
        seq_lens: ``[B]``, lengths with the new token.
        scaling: factor of the scores; None takes ``head_size ** -0.5``.
    """
    order = torch.argsort(seq_lens)
    for rows in order.split(SEQUENCES_A_CALL):
        lengths = seq_lens[rows]
        longest = int(lengths[-1])
        slots = req_to_token[req_pool_indices[rows], :longest]
        is_inside = torch.arange(longest, device=lengths.device) < lengths[:, None]
        # The query heads that share a key head stand where the positions of a longer query would.
        num_sequences, key_value_heads = len(rows), k_cache.shape[1]
        grouped = query[rows].view(num_sequences, key_value_heads, -1, query.shape[-1])
        result = scaled_dot_product_attention(
            grouped,
            _gather(k_cache, slots, query.dtype),
            _gather(v_cache, slots, query.dtype),
            attn_mask=is_inside[:, None, None, :],
            scale=scaling,
        )
        output[rows] = result.reshape(num_sequences, *output.shape[1:])
    return output


def extend_attention(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention of the new tokens of each sequence; shapes as in :func:`decode_attention`.

    Args:
        query: ``[new tokens of all sequences, heads, head_size]``, sequence after sequence.
        extend_prefix_lens: ``[B]``, tokens of each sequence that are in the cache already.
        extend_seq_lens: ``[B]``, new tokens of each sequence.
    """
    start = 0
    sequences = zip(
        req_pool_indices.tolist(),
        seq_lens.tolist(),
        extend_prefix_lens.tolist(),
        extend_seq_lens.tolist(),
        strict=True,
    )
    for row, length, num_cached, num_new in sequences:
        slots = req_to_token[row, :length][None]
        new = slice(start, start + num_new)
        mask = None
        if num_cached:
            last_seen = torch.arange(num_cached, length, device=query.device)
            mask = torch.arange(length, device=query.device) <= last_seen[:, None]
        result = scaled_dot_product_attention(
            query[new].movedim(0, 1)[None],
            _gather(k_cache, slots, query.dtype),
            _gather(v_cache, slots, query.dtype),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != k_cache.shape[1],
        )
        output[new] = result[0].movedim(0, 1)
        start += num_new
    return output


def _gather(cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[slots, heads, size]`` and ``[B, L]`` -> ``[B, heads, L, size]``."""
    rows = cache.index_select(0, slots.reshape(-1)).to(dtype)
    return rows.view(*slots.shape, *cache.shape[1:]).transpose(1, 2)


def _in_the_plain_case(
    ours: Callable[..., torch.Tensor], original: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    def run(self: Any, *tensors: Any, **options: Any) -> torch.Tensor:
        # SGLang passes encoder_lens as the last positional argument.
        *plain, encoder_lens = tensors
        is_plain = (
            encoder_lens is None
            and not options.get("is_cross_attn")
            and options.get("sliding_window_size") is None
            # Decoding sets causal to False: its one query sees everything.
            and (options.get("causal") or ours is decode_attention)
        )
        if is_plain:
            return ours(*plain, scaling=options.get("scaling"))
        return original(self, *tensors, **options)

    return run
