"""Sends requests to the engines: bounded, with a deadline, retried only where that can help.

What SGLang 0.5.23 returns as the log-probs of *sampled* tokens (tests/serving/test_engines.py
measures it): those of softmax(logits / temperature), before top-p and top-k cut it. At temperature
0 (greedy) they are those of softmax(logits).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp
import numpy as np
import orjson
from numpy.typing import NDArray

from sod_mcore.serving.fleet import Endpoints, ModelEndpoints

TokenIds = Sequence[int] | NDArray[np.integer[Any]]
"""Token ids ``[T]``."""

Body = bytes | AsyncIterator[bytes] | None
"""What a request carries."""

RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})
CONNECT_SECONDS = 10.0
ABORT_SECONDS = 5.0
INITIAL_VERSION = "default"
"""What an engine reports when its start named no weight version; counts as version 0."""


class EngineError(Exception):
    """An engine refused a request (then ``retryable`` is False) or did not answer in time.

    Attributes:
        status: HTTP status of the answer; None if there was no answer, or a wrong one.
    """

    def __init__(self, message: str, *, retryable: bool, status: int | None = None) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.status = status


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


class EngineClient:
    """Requests to the served models over one pool of connections; an async context manager.

    Args:
        endpoints: the fleet.
        request_timeout_seconds: longest time for one request, all its tries included.
        max_connections: open requests to one model; more wait for their turn, which does not count
            towards the timeout.
        attempts: tries of a request that fails in a way that may pass: no connection, 429, 5xx.
        first_backoff_seconds: wait after the first failure; it doubles from try to try up to
            ``longest_backoff_seconds``, and a random half of it is left out so that clients do not
            come back in step.
        keep_alive: use connections again. A caller that keeps the event loop from running for
            seconds must not: it would not notice that the server has closed them.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        *,
        request_timeout_seconds: float = 300.0,
        max_connections: int = 256,
        attempts: int = 5,
        first_backoff_seconds: float = 0.25,
        longest_backoff_seconds: float = 8.0,
        keep_alive: bool = True,
    ) -> None:
        self.endpoints = endpoints
        self._request_timeout_seconds = request_timeout_seconds
        self._attempts = attempts
        self._first_backoff_seconds = first_backoff_seconds
        self._longest_backoff_seconds = longest_backoff_seconds
        self._keep_alive = keep_alive
        self._slots = {name: asyncio.Semaphore(max_connections) for name in endpoints.models}
        self._open_session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> EngineClient:
        self._open_session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=not self._keep_alive),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        )
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open_session is not None:
            await self._open_session.close()
            self._open_session = None

    async def generate(
        self, model: str, input_ids: TokenIds, sampling: SamplingSettings, *, rid: str
    ) -> Generation:
        """Sample tokens after ``input_ids``.

        Args:
            model: name of a served model.
            input_ids: ``[T]`` token ids.
            sampling: how to sample.
            rid: name of the request, unique among those that run; a second try gets a suffix.

        Raises:
            EngineError: refused, or failed in every try, or past the deadline.
            ValueError: an id outside the vocabulary.
        """
        request = {
            "input_ids": check_token_ids(self.endpoints.model(model), input_ids),
            "sampling_params": sampling.as_request(),
            "return_logprob": True,
        }
        return _read_generation(await self.post_generate(model, request, rid=rid))

    async def post_generate(
        self,
        model: str,
        request: dict[str, Any],
        *,
        rid: str | None = None,
        base_url: str | None = None,
    ) -> dict[str, Any]:
        """Send one request to ``/generate`` and return the decoded answer.

        It goes to the model's route, or to ``base_url`` for what only an engine understands. When
        the caller is cancelled or the deadline passes, the engines are told to abort.

        Raises:
            EngineError: refused, or failed in every try, or past the deadline.
        """
        endpoints = self.endpoints.model(model)
        rid = rid or uuid.uuid4().hex
        url = f"{base_url or endpoints.route}/generate"
        async with self._slots[model]:
            current = rid
            try:
                async with asyncio.timeout(self._request_timeout_seconds):
                    for attempt in range(1, self._attempts + 1):
                        current = rid if attempt == 1 else f"{rid}.{attempt}"
                        body = orjson.dumps({"model": model, "rid": current, **request})
                        try:
                            return await self._post(url, body)
                        except EngineError as error:
                            if not error.retryable:
                                raise
                            if attempt == self._attempts:
                                message = f"{model}: gave up after {attempt} tries: {error}"
                                raise EngineError(message, retryable=True) from error
                        await asyncio.sleep(self._backoff_seconds(attempt))
                    raise AssertionError("unreachable: the last try returns or raises")
            except TimeoutError as error:
                await self._abort(endpoints, current)
                message = f"{model}: no answer within {self._request_timeout_seconds:g} s"
                raise EngineError(message, retryable=True) from error
            except asyncio.CancelledError:
                # Shielded: the cancelled task may be cancelled again while it cleans up.
                await asyncio.shield(self._abort(endpoints, current))
                raise

    async def get(self, url: str) -> dict[str, Any]:
        """GET a JSON document (one try).

        Raises:
            EngineError: the server did not answer with 200 and JSON.
        """
        return await self._once("GET", url, None)

    async def post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST a JSON document (one try).

        Raises:
            EngineError: the server did not answer with 200 and JSON.
        """
        return await self._once("POST", url, orjson.dumps(body))

    async def post_stream(self, url: str, body: AsyncIterator[bytes]) -> dict[str, Any]:
        """POST a JSON document whose pieces are made while it is sent (one try).

        Raises:
            EngineError: the server did not answer with 200 and JSON.
        """
        return await self._once("POST", url, body)

    async def _once(self, method: str, url: str, body: Body) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._request_timeout_seconds):
                return await self._request(method, url, body)
        except TimeoutError as error:
            message = f"{url}: no answer within {self._request_timeout_seconds:g} s"
            raise EngineError(message, retryable=True) from error

    def _backoff_seconds(self, attempt: int) -> float:
        longest = self._first_backoff_seconds * 2 ** (attempt - 1)
        return min(longest, self._longest_backoff_seconds) * random.uniform(0.5, 1.0)

    async def _post(self, url: str, body: bytes) -> dict[str, Any]:
        return await self._request("POST", url, body)

    async def _request(self, method: str, url: str, body: Body) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.request(method, url, data=body, headers=headers) as response:
                content = await response.read()
        except (aiohttp.ClientError, ConnectionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise EngineError(f"{url}: {reason}", retryable=True) from error
        if response.status != 200:
            text = content.decode(errors="replace")[:1000]
            raise EngineError(
                f"{url} answered {response.status}: {text}",
                retryable=response.status in RETRIED_STATUSES,
                status=response.status,
            )
        if not content:
            return {}
        try:
            answer: dict[str, Any] = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            message = f"{url} did not answer with JSON: {error}"
            raise EngineError(message, retryable=True, status=response.status) from error
        return answer

    async def _abort(self, endpoints: ModelEndpoints, rid: str) -> None:
        """Tell every engine of the model; only one has the request, the others ignore it."""
        body = orjson.dumps({"rid": rid})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ABORT_SECONDS):
                await asyncio.gather(
                    *(self._post(f"{url}/abort_request", body) for url in endpoints.engines),
                    return_exceptions=True,
                )

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._open_session is None:
            raise RuntimeError("EngineClient is used outside of `async with EngineClient(...)`")
        return self._open_session


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


def _read_generation(answer: dict[str, Any]) -> Generation:
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
