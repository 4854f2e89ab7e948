"""What every way of bringing weights to an engine has in common: the interface, and the error.

The frame (pause, transfer, confirm, continue) is in ``weights``; a transfer only moves numbers. So
a further way is one more class.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.endpoints import ModelEndpoints


class WeightUpdateError(Exception):
    """An engine does not have the new weights; nothing may be generated until it has."""


class WeightTransfer(Protocol):
    """Moves one version of the weights to engines that stand still."""

    def check(self, endpoints: ModelEndpoints) -> None:
        """Refuse what is known to be wrong while the engines still run.

        Raises:
            WeightUpdateError: names what is wrong, and the mend.
        """

    async def send(
        self, client: EngineClient, endpoints: ModelEndpoints, version: int, *, flush_cache: bool
    ) -> None:
        """Load the weights into every engine of the model.

        From then on they report ``version``, and not before: until all weights have arrived, an
        engine holds some of each version.

        Args:
            flush_cache: empty their prefix caches; an engine refuses that, and with it the version,
                while requests are paused in place.

        Raises:
            EngineError: an engine refused or did not answer.
            WeightUpdateError: the weights cannot be sent.
        """


async def post_to_all(
    client: EngineClient, engines: Sequence[str], endpoint: str, request: Mapping[str, Any]
) -> None:
    """POST the same request to every engine at once.

    Raises:
        EngineError: one of them refused or did not answer.
    """
    await asyncio.gather(*(client.post(f"{url}/{endpoint}", dict(request)) for url in engines))
