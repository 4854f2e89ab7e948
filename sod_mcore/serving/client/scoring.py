"""Scores given tokens with a served model: log-probs of every token after the prompt.

SGLang scores inputs at temperature 1 whatever the request says. ``logprob_start_len`` is the
position before the first wanted token, so that the prompt comes from the prefix cache; 0 would
recompute the whole prompt. All samples of a prompt go to one engine for the same reason.

Likeliest tokens come as base64 arrays; an engine that does not know the fields which ask for them
answers with nested lists. For K = 32 the arrays are 375 bytes a token instead of 1007, a tenth of
the client's time and two thirds of the engine's.
"""

from __future__ import annotations

import base64
import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.messages import TokenIds, check_token_ids
from sod_mcore.serving.client.replicas import Affinity


class ScoringError(Exception):
    """The answer cannot be trusted; the trajectory counts as unscored, never as zeros."""


@dataclass(frozen=True)
class Scores:
    """Log-probs of ``T`` given tokens in nats, at temperature 1; entry t is about token t.

    Attributes:
        logprobs: float32 ``[T]``, NaN before ``prompt_length``.
        topk_ids: int32 ``[T, K]``, the likeliest tokens, likeliest first, -1 before
            ``prompt_length``; None if not asked for.
        topk_logprobs: float32 ``[T, K]``, NaN before ``prompt_length``; None if not asked for.
    """

    logprobs: NDArray[np.float32]
    topk_ids: NDArray[np.int32] | None = None
    topk_logprobs: NDArray[np.float32] | None = None


async def score(
    client: EngineClient,
    model: str,
    token_ids: TokenIds,
    prompt_length: int,
    top_k: int = 0,
    *,
    temperature: float = 1.0,
    in_flight: AbstractContextManager[None] | None = None,
) -> Scores:
    """Score ``token_ids[prompt_length:]``, each given all tokens before it.

    Args:
        client: an open client.
        model: name of a served model.
        token_ids: ``[T]`` ids, prompt included.
        prompt_length: leading tokens that need no score, from 1 to T.
        top_k: likeliest tokens returned for each position; 0 for none.
        temperature: what the engine is told, and does not heed: inputs are scored at 1.
        in_flight: held while the engine is asked, as by :meth:`EngineClient.post_generate`.

    Raises:
        ScoringError: the answer is about other tokens, or a value is not finite.
        EngineError: the engine did not answer.
        ValueError: ``prompt_length`` or an id is out of range.
    """
    if not 1 <= prompt_length <= len(token_ids):
        raise ValueError(
            f"prompt_length is {prompt_length}; it must be from 1 to {len(token_ids)}, the number "
            "of tokens: the first token has no log-prob"
        )
    ids = np.asarray(token_ids, dtype=np.int32)
    if prompt_length == len(ids):
        return _place(ids, prompt_length, np.zeros(0, np.float32), _no_candidates(top_k))
    endpoints = client.endpoints.model(model)
    request: dict[str, Any] = {
        "input_ids": check_token_ids(endpoints, token_ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": temperature},
        "return_logprob": True,
        "logprob_start_len": prompt_length - 1,
    }
    if top_k:
        request |= {
            "top_logprobs_num": top_k,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
    affinity = _prompt_affinity(ids[:prompt_length])
    answer = await client.post_generate(model, request, affinity=affinity, in_flight=in_flight)
    try:
        scored = read_answer(
            answer["meta_info"], ids[prompt_length - 1 :], endpoints.vocab_size, top_k
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ScoringError(f"{model}: the answer cannot be read: {error!r}") from error
    return _place(ids, prompt_length, *scored)


def read_answer(
    meta: dict[str, Any], expected_ids: NDArray[np.int32], vocab_size: int, top_k: int
) -> tuple[NDArray[np.float32], Candidates | None]:
    """Log-probs ``[N]`` of ``expected_ids[1:]``, and the candidates at their positions.

    Args:
        meta: the engine's ``meta_info``.
        expected_ids: ``[N + 1]``, the token before the first scored one, and the scored ones.

    Raises:
        ScoringError: the answer is about other tokens, or a value is not finite.
        KeyError, IndexError, TypeError, ValueError: it has another form.
    """
    logprobs = _read_logprobs(meta, expected_ids, vocab_size)
    return logprobs, _read_candidates(meta, len(logprobs), top_k) if top_k else None


Candidates = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Ids and log-probs ``[N, K]`` of the likeliest tokens."""


def _prompt_affinity(prompt_ids: NDArray[np.int32]) -> Affinity:
    """The same for all samples of a prompt."""
    digest = hashlib.blake2b(prompt_ids.tobytes(), digest_size=16).hexdigest()
    return Affinity(f"scoring {digest}")


def _read_logprobs(
    meta: dict[str, Any], expected_ids: NDArray[np.int32], vocab_size: int
) -> NDArray[np.float32]:
    """Log-probs of ``expected_ids[1:]``; entry 0 of the answer is the token that they follow."""
    entries = meta["input_token_logprobs"]
    if len(entries) != len(expected_ids):
        raise ScoringError(f"{len(entries)} scores came back for {len(expected_ids)} positions")
    returned_ids = np.array([entry[1] for entry in entries], dtype=np.int64)
    # SGLang 0.5.23 labels the last token of the vocabulary as token 0 (it clips ids one too low);
    # the value is that of the right token.
    labels = np.where(expected_ids == vocab_size - 1, 0, expected_ids)
    wrong = np.flatnonzero((returned_ids != expected_ids) & (returned_ids != labels))
    if len(wrong):
        first = int(wrong[0])
        raise ScoringError(
            f"the score at position {first} after the start is about token {returned_ids[first]}, "
            f"but token {expected_ids[first]} was sent"
        )
    # None, which is how JSON carries a value that is not finite, becomes NaN here.
    logprobs = np.array([entry[0] for entry in entries[1:]], dtype=np.float32)
    return _finite(logprobs, "log-prob")


def _read_candidates(meta: dict[str, Any], num_positions: int, top_k: int) -> Candidates:
    """Ids and log-probs of the likeliest tokens, from arrays or from nested lists."""
    if "input_top_logprobs_shape" in meta:
        if meta["input_top_logprobs_null_prefix"] != 1:
            raise ScoringError(f"top-{top_k} does not begin one position after the start")
        shape = meta["input_top_logprobs_shape"]
        ids = _decode(meta["input_top_logprobs_idx_flat_b64"], "<i4").reshape(shape)
        logprobs = _decode(meta["input_top_logprobs_val_flat_b64"], "<f4").reshape(shape)
    else:
        rows = meta["input_top_logprobs"][1:]
        ids = np.array([[entry[1] for entry in row] for row in rows], dtype=np.int32)
        logprobs = np.array([[entry[0] for entry in row] for row in rows], dtype=np.float32)
    if ids.shape != (num_positions, top_k) or logprobs.shape != ids.shape:
        raise ScoringError(f"top-{top_k} came back as {ids.shape} for {num_positions} positions")
    return ids.astype(np.int32), _finite(logprobs.astype(np.float32), f"top-{top_k} log-prob")


def _decode(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def _finite(values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise ScoringError(f"a {name} is not finite")
    return values


def _no_candidates(top_k: int) -> Candidates | None:
    shape = (0, top_k)
    return (np.zeros(shape, np.int32), np.zeros(shape, np.float32)) if top_k else None


def _place(
    ids: NDArray[np.int32],
    prompt_length: int,
    logprobs: NDArray[np.float32],
    candidates: Candidates | None,
) -> Scores:
    """Put the values behind the prompt's empty positions."""
    whole = np.full(len(ids), np.nan, dtype=np.float32)
    whole[prompt_length:] = logprobs
    if candidates is None:
        return Scores(whole)
    candidate_ids, candidate_logprobs = candidates
    shape = (len(ids), candidate_ids.shape[1])
    whole_ids = np.full(shape, -1, dtype=np.int32)
    whole_logprobs = np.full(shape, np.nan, dtype=np.float32)
    whole_ids[prompt_length:] = candidate_ids
    whole_logprobs[prompt_length:] = candidate_logprobs
    return Scores(whole, whole_ids, whole_logprobs)
