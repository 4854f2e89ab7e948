"""Shows, before any work, that each engine scores as the numbers of training assume.

Design rules 4 and 5: inputs are scored at temperature 1 whatever the request says, and entry t is
about token t wherever scoring starts. Two calls must agree as well: scores of one trajectory are
compared with those of another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.scoring import score
from sod_mcore.serving.endpoints import Endpoints, FleetError
from sod_mcore.serving.fleet.probe import OUTAGE_SECONDS, PROBE_LENGTH, probe_token_ids

TEMPERATURE = 0.5
"""Would double the logits of an engine that heeds it."""


async def check_scoring(endpoints: Endpoints, *, tolerance: float, timeout_seconds: float) -> None:
    """Score the probe in several ways on every engine of every model.

    Args:
        endpoints: the fleet.
        tolerance: largest difference allowed between two ways, in nats.
        timeout_seconds: longest wait for one answer.

    Raises:
        FleetError: an engine scores in another way than it should.
        EngineError: an engine did not answer.
        ScoringError: an answer cannot be trusted.
    """
    for name, model in endpoints.models.items():
        for url in model.engines:
            async with EngineClient(
                endpoints.reached_at(name, url),
                request_timeout_seconds=timeout_seconds,
                restart_timeout_seconds=OUTAGE_SECONDS,
            ) as client:
                await _check_engine(client, name, url, tolerance)


async def _check_engine(client: EngineClient, name: str, url: str, tolerance: float) -> None:
    ids = probe_token_ids(client.endpoints.model(name).vocab_size)
    first = (await score(client, name, ids, 1)).logprobs
    again = (await score(client, name, ids, 1)).logprobs
    middle = PROBE_LENGTH // 2
    later = (await score(client, name, ids, middle)).logprobs
    tempered = (await score(client, name, ids, 1, temperature=TEMPERATURE)).logprobs
    for difference, problem in (
        (_difference(again, first), "scores the probe differently in a second call"),
        (
            _difference(later[middle:], first[middle:]),
            f"scores the probe differently from token {middle} on: its entries are shifted, or its "
            "prefix cache is wrong",
        ),
        (
            _difference(tempered, first),
            f"heeds a temperature of {TEMPERATURE} where it scores; distillation needs scores at 1",
        ),
    ):
        if difference > tolerance:
            raise FleetError(
                f"{name}: {url} {problem} ({difference:.3g} nats; serving.probe_tolerance is "
                f"{tolerance:g}); use a version of SGLang that docs/serving.md names"
            )


def _difference(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float(np.nanmax(np.abs(first - second)))
