"""Gives the student's engines new weights and confirms that they have them.

Called by the trainer, which is synchronous. Weights go to each engine directly: a router would
reach only one of them. A teacher never changes, unless it is said to follow the student. How the
numbers travel is a :class:`WeightTransfer`: ``disk_transfer``, ``tensor_transfer``,
``distributed_transfer``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.json_http import EngineError, JsonHttp
from sod_mcore.serving.client.messages import TokenIds, parse_weight_version
from sod_mcore.serving.client.scoring import score
from sod_mcore.serving.endpoints import Endpoints
from sod_mcore.serving.weights.transfer import WeightTransfer, WeightUpdateError, post_to_all

TRAINED_MODEL = "student"
FOLLOWING_MODEL = "teacher"
"""May hold an average of the student's weights."""
FLUSHED, NOT_IDLE = 200, 400
"""Statuses of ``/flush_cache``, whose answer is no JSON."""

MemoryTag = Literal["weights", "kv_cache"]
"""Kinds of an engine's memory, by SGLang's names."""
WEIGHTS: MemoryTag = "weights"
KV_CACHE: MemoryTag = "kv_cache"

RunningRequests = Literal["retract", "in_place", "abort"]
"""What becomes of requests that an update interrupts: SGLang's modes of ``/pause_generation``."""
OUTAGE_SECONDS = 5.0
"""Longest wait for an engine that fails meanwhile: when it is started again, it holds other weights
than those that are asked about."""


class SleepingEngines(Protocol):
    """Engines that may have released their memory (``sleep``)."""

    async def wake(self, client: EngineClient, engines: Sequence[str], tag: MemoryTag) -> None:
        """Give one kind of memory back to those of ``engines`` that are asleep.

        Raises:
            EngineError: an engine refused or did not answer.
        """

    def are_awake(self, engines: Sequence[str]) -> None:
        """Hear that these answer requests again."""


def update_weights(
    endpoints: Endpoints,
    model: str,
    transfer: WeightTransfer,
    version: int,
    timeout: float,
    *,
    running_requests: RunningRequests = "retract",
    follows_student: bool = False,
    sleep: SleepingEngines | None = None,
) -> None:
    """Bring new weights to every engine of ``model``, and confirm the version that each reports.

    Generation stands still meanwhile. The prefix cache, which holds the old weights' keys and
    values, is emptied, unless requests go on in place. When an engine fails, all of them stay
    paused, for some may hold weights of both versions: a second call may mend that.

    Args:
        endpoints: the fleet.
        model: "student"; or "teacher", if ``follows_student``.
        transfer: the way, with the weights.
        version: number of the weights, which each later answer carries.
        timeout: longest wait in seconds for one answer of an engine.
        running_requests: "retract" computes their prefix anew with the new weights and goes on;
            "in_place" goes on with the old keys and values. Either way the answer says which
            version sampled which token. "abort" ends them.
        follows_student: whether the teacher is an average of the student's weights.
        sleep: wakes engines that are asleep: their weights' memory before the weights arrive, their
            cache's when all have confirmed the version.

    Raises:
        ValueError: ``model`` must not change, or ``version`` is negative.
        WeightUpdateError: the weights are damaged or do not fit, or an engine refused, did not
            answer in time, or reports another version.
    """
    may_change = (TRAINED_MODEL, FOLLOWING_MODEL) if follows_student else (TRAINED_MODEL,)
    if model not in may_change:
        names = " and ".join(map(repr, may_change))
        raise ValueError(f"model is {model!r}; only the weights of {names} ever change")
    if version < 0:
        raise ValueError(f"version is {version}; versions count from 0")
    transfer.check(endpoints.model(model))
    asyncio.run(_update_all(endpoints, model, transfer, version, timeout, running_requests, sleep))


def weight_versions(endpoints: Endpoints, model: str, timeout: float) -> tuple[int, ...]:
    """The weight version that each engine of ``model`` reports.

    Raises:
        EngineError: an engine did not answer.
    """

    async def ask_all() -> tuple[int, ...]:
        async with _client(endpoints, timeout) as client:
            urls = endpoints.model(model).engines
            return tuple(await asyncio.gather(*(_reported_version(client, url) for url in urls)))

    return asyncio.run(ask_all())


def reported_versions(urls: Sequence[str], timeout: float) -> dict[str, int | None]:
    """The weight version that each engine reports; None where there is no answer.

    Args:
        urls: base URLs of engines, of whatever model.
        timeout: longest wait in seconds for one answer.
    """

    async def ask(http: JsonHttp, url: str) -> int | None:
        try:
            answer = await http.get(f"{url}/model_info", timeout)
            return parse_weight_version(answer["weight_version"])
        except (EngineError, KeyError):
            return None

    async def ask_all() -> list[int | None]:
        http = JsonHttp(keep_alive=False)
        try:
            return await asyncio.gather(*(ask(http, url) for url in urls))
        finally:
            await http.close()

    return dict(zip(urls, asyncio.run(ask_all()), strict=True)) if urls else {}


def probe_logprobs(
    endpoints: Endpoints, model: str, token_ids: TokenIds, timeout: float
) -> NDArray[np.float32]:
    """Log-probs ``[engines, T]`` of ``token_ids`` on each engine of ``model`` (entry 0 is NaN).

    The trainer compares them with its own: that, and not the version alone, shows that an engine
    holds the trainer's weights.

    Raises:
        EngineError: an engine did not answer.
        ScoringError: an answer cannot be trusted.
    """

    async def score_all() -> NDArray[np.float32]:
        rows = []
        for url in endpoints.model(model).engines:
            async with _client(endpoints.reached_at(model, url), timeout) as client:
                rows.append((await score(client, model, token_ids, prompt_length=1)).logprobs)
        return np.stack(rows)

    return asyncio.run(score_all())


async def _update_all(
    endpoints: Endpoints,
    model: str,
    transfer: WeightTransfer,
    version: int,
    timeout: float,
    running_requests: RunningRequests,
    sleep: SleepingEngines | None,
) -> None:
    served = endpoints.model(model)
    async with _client(endpoints, timeout) as client:
        try:
            # All are paused before any is changed, so that no request meets mixed replicas.
            pause = {"mode": running_requests}
            await post_to_all(client, served.engines, "pause_generation", pause)
            is_in_place = running_requests == "in_place"
            if sleep is not None:
                await sleep.wake(client, served.engines, WEIGHTS)
            await transfer.send(client, served, version, flush_cache=not is_in_place)
            if is_in_place:
                await asyncio.gather(*(_flush_if_idle(client, url) for url in served.engines))
            for url in served.engines:
                await _confirm(client, url, version)
            if sleep is not None:
                await sleep.wake(client, served.engines, KV_CACHE)
            await post_to_all(client, served.engines, "continue_generation", {})
            if sleep is not None:
                sleep.are_awake(served.engines)
        except (EngineError, WeightUpdateError) as error:
            raise WeightUpdateError(f"{model}: version {version} not loaded: {error}") from error


async def _flush_if_idle(client: EngineClient, url: str) -> None:
    """Empty an engine's prefix cache; SGLang refuses that while a request holds part of it."""
    try:
        await client.post(f"{url}/flush_cache", {})
    except EngineError as error:
        if error.status not in (FLUSHED, NOT_IDLE):
            raise


async def _confirm(client: EngineClient, url: str, version: int) -> None:
    reported = await _reported_version(client, url)
    if reported != version:
        raise WeightUpdateError(
            f"{url} took weight version {version} but reports version {reported}"
        )


async def _reported_version(client: EngineClient, url: str) -> int:
    return parse_weight_version((await client.get(f"{url}/model_info"))["weight_version"])


def _client(endpoints: Endpoints, timeout: float) -> EngineClient:
    return EngineClient(
        endpoints,
        request_timeout_seconds=timeout,
        restart_timeout_seconds=OUTAGE_SECONDS,
        keep_alive=False,
    )
