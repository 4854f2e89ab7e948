"""Shows, before any work, that each route leads to the model that it is named after.

A fixed sequence of ids is scored by every engine directly and through every route; a router that
mixes models, or replicas that hold different weights, would give other numbers.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.scoring import score
from sod_mcore.serving.endpoints import Endpoints, FleetError

PROBE_LENGTH = 32
OUTAGE_SECONDS = 5.0
"""Longest wait for a server that fails: nobody starts it again at this time."""


def probe_token_ids(vocab_size: int) -> list[int]:
    """The fixed probe: ``[32]`` ids spread over the vocabulary."""
    return [(7919 * n * n + 31 * n + 5) % vocab_size for n in range(PROBE_LENGTH)]


DEFAULT_TOLERANCE = 0.1
"""Nats; above what bfloat16 engines differ by between two batches, far below two models."""


async def check_routes(
    endpoints: Endpoints, *, tolerance: float, timeout_seconds: float
) -> dict[str, NDArray[np.float32]]:
    """Score the probe through every route and on every engine of every model.

    Args:
        endpoints: the fleet.
        tolerance: largest difference allowed between a route and an engine, in nats.
        timeout_seconds: longest wait for one answer.

    Returns:
        The probe's log-probs ``[31]`` by model name, as the first engine gave them.

    Raises:
        FleetError: a route leads elsewhere, replicas differ, or two models are the same.
    """
    probes = {}
    for name, model in endpoints.models.items():
        first_url, *other_urls = dict.fromkeys(
            (*model.engines, model.route, endpoints.front_door)  # each once, engines first
        )
        probes[name] = await _score_at(endpoints, name, first_url, timeout_seconds)
        for url in other_urls:
            other = await _score_at(endpoints, name, url, timeout_seconds)
            difference = _largest_difference(other, probes[name])
            if difference > tolerance:
                raise FleetError(
                    f"{name}: {url} scores the probe {difference:.3g} nats away from {first_url} "
                    f"(serving.probe_tolerance is {tolerance:g}): it leads to another model or to "
                    "other weights"
                )
    for first, second in itertools.combinations(endpoints.models.values(), 2):
        difference = _largest_difference(probes[first.name], probes[second.name])
        are_one = Path(first.model_path).resolve() == Path(second.model_path).resolve()
        if not are_one and difference <= tolerance:
            raise FleetError(
                f"{first.name} ({first.model_path}) and {second.name} ({second.model_path}) give "
                "equal scores for the probe: either a route is wrong or both folders hold the same "
                "weights; to distil a model into itself on purpose, give both one model_path"
            )
    return probes


def _largest_difference(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float(np.abs(first - second).max())


async def _score_at(
    endpoints: Endpoints, name: str, url: str, timeout_seconds: float
) -> NDArray[np.float32]:
    ids = probe_token_ids(endpoints.model(name).vocab_size)
    async with EngineClient(
        endpoints.reached_at(name, url),
        request_timeout_seconds=timeout_seconds,
        restart_timeout_seconds=OUTAGE_SECONDS,
    ) as client:
        scores = await score(client, name, ids, prompt_length=1)
    return scores.logprobs[1:]
