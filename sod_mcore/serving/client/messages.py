"""What SGLang's ``/generate`` is asked, and what it answers.

What SGLang 0.5.23 returns as the log-probs of *sampled* tokens (tests/serving/test_engines.py
measures it): those of softmax(logits / temperature), before top-p and top-k cut it. At temperature
0 (greedy) they are those of softmax(logits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.endpoints import ModelEndpoints

TokenIds = Sequence[int] | NDArray[np.integer[Any]]
"""Token ids ``[T]``."""

INITIAL_VERSION = "default"
"""What an engine reports when its start named no weight version; counts as version 0."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are sampled.

    Attributes:
        max_new_tokens: most tokens sampled.
        temperature: divides the logits; 0 is greedy.
        top_p: nucleus sampling; 1 turns it off.
        top_k: sampling from the k likeliest; -1 turns it off.
        stop_token_ids: sampling ends after any of these, which is then the last token returned.
        ignore_eos: do not stop at the model's own end-of-sequence tokens.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def as_request(self) -> dict[str, Any]:
        """The ``sampling_params`` of SGLang's ``/generate``."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop_token_ids": list(self.stop_token_ids) or None,
            "ignore_eos": self.ignore_eos,
        }


@dataclass(frozen=True)
class Generation:
    """What an engine sampled after ``input_ids``.

    Attributes:
        token_ids: int32 ``[N]``, the sampled tokens, the stop token included.
        logprobs: float32 ``[N]``, their log-probs in nats under the tempered distribution.
        finish_reason: "stop", "length" or "abort".
        weight_version: version of the weights when sampling ended.
        weight_versions: int32 ``[N]``, the version that sampled each token; they differ when the
            weights were changed in the middle.
        cached_tokens: leading tokens of the input that were taken from the prefix cache.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: str
    weight_version: int
    weight_versions: NDArray[np.int32]
    cached_tokens: int = 0


def check_token_ids(endpoints: ModelEndpoints, token_ids: TokenIds) -> list[int]:
    """The ids as a list of Python integers.

    Raises:
        ValueError: there is none, or one is outside the model's vocabulary. SGLang 0.5.23 does not
            check this: its scheduler dies of such an id, and the whole engine with it.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be a flat, non-empty list of integers, not {ids!r}")
    if ids.min() < 0 or ids.max() >= endpoints.vocab_size:
        bad = ids[(ids < 0) | (ids >= endpoints.vocab_size)][0]
        raise ValueError(
            f"token id {bad} is outside the vocabulary of {endpoints.name} "
            f"(0 to {endpoints.vocab_size - 1})"
        )
    listed: list[int] = ids.tolist()
    return listed


def parse_weight_version(text: object) -> int:
    """The weight version that an engine reports, as an integer.

    Raises:
        EngineError: somebody gave the engine a version that is not a number.
    """
    if text == INITIAL_VERSION:
        return 0
    try:
        return int(str(text))
    except ValueError:
        raise EngineError(
            f"the engine reports weight version {text!r}, which is not a number; start it with "
            "--weight-version 0 or without that argument",
            retryable=False,
        ) from None


def require_meta_info(url: str, answer: object) -> None:
    """Refuse a document that is no answer of ``/generate``.

    Raises:
        EngineError: it lacks what every answer has.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("meta_info"), dict):
        message = f"{url} answered without meta_info: {str(answer)[:200]}"
        raise EngineError(message, retryable=True, status=200)


def oldest_weight_version(answer: Mapping[str, Any]) -> int:
    """The oldest version that took part in an answer: an update in the middle leaves two.

    Raises:
        EngineError: the answer does not say, or a version is not a number.
    """
    meta = answer["meta_info"]
    try:
        spans = meta.get("weight_versions") or []
        versions = [meta["weight_version"], *(span["version"] for span in spans)]
    except (KeyError, TypeError) as error:
        message = f"the answer names no weight version: {error!r}"
        raise EngineError(message, retryable=False) from error
    return min(parse_weight_version(version) for version in versions)


def read_generation(answer: Mapping[str, Any]) -> Generation:
    """What an engine sampled.

    Raises:
        EngineError: the request was aborted, or the answer cannot be used.
    """
    try:
        return _read_generation(answer)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise EngineError(f"the answer cannot be read: {error!r}", retryable=True) from error


def _read_generation(answer: Mapping[str, Any]) -> Generation:
    meta = answer["meta_info"]
    if meta["finish_reason"]["type"] == "abort":
        # Somebody ended the request; what was sampled so far is no turn of the student's.
        raise EngineError("the engine aborted the request", retryable=True)
    token_ids = np.asarray(answer["output_ids"], dtype=np.int32)
    entries = meta["output_token_logprobs"][: len(token_ids)]
    logprobs = np.array([entry[0] for entry in entries], dtype=np.float32)
    entry_ids = np.array([entry[1] for entry in entries], dtype=np.int32)
    if not np.array_equal(entry_ids, token_ids):
        raise EngineError(
            f"the engine returned {len(token_ids)} tokens and log-probs of other tokens",
            retryable=False,
        )
    if not np.isfinite(logprobs).all():
        raise EngineError("the engine returned a log-prob that is not finite", retryable=True)
    version = parse_weight_version(meta["weight_version"])
    weight_versions = np.full(len(token_ids), version, dtype=np.int32)
    for span in meta.get("weight_versions") or []:
        weight_versions[span["start"] : span["end"]] = parse_weight_version(span["version"])
    return Generation(
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=meta["finish_reason"]["type"],
        weight_version=version,
        weight_versions=weight_versions,
        cached_tokens=meta.get("cached_tokens", 0),
    )
