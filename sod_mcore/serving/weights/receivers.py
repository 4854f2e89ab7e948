"""Engines that take weights as tensors: how many ranks each has, and the session around an update.

SGLang 0.5.21 and later take tensors only between ``/begin_weight_update`` and
``/end_weight_update``; earlier versions know neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.weights.transfer import post_to_all


@dataclass(frozen=True)
class Receiver:
    """An engine that takes tensors.

    Attributes:
        url: its base URL.
        ranks: tensor-parallel size.
        pipeline_stages: pipeline-parallel size.
        device: "cpu" or "cuda".
        has_session: whether this version of SGLang wants to be told where an update ends.
    """

    url: str
    ranks: int
    pipeline_stages: int
    device: str
    has_session: bool


async def open_receivers(client: EngineClient, engines: Sequence[str]) -> tuple[Receiver, ...]:
    """Begin an update on every engine.

    Raises:
        EngineError: one of them refused or did not answer.
    """
    return tuple([await _open_receiver(client, url) for url in engines])


async def close_receivers(client: EngineClient, receivers: Sequence[Receiver]) -> None:
    """End the update on every engine that wants to be told.

    Raises:
        EngineError: one of them refused or did not answer.
    """
    with_session = [receiver.url for receiver in receivers if receiver.has_session]
    await post_to_all(client, with_session, "end_weight_update", {})


async def _open_receiver(client: EngineClient, url: str) -> Receiver:
    server = await client.get(f"{url}/server_info")
    return Receiver(
        url=url,
        ranks=int(server.get("tp_size", 1)),
        pipeline_stages=int(server.get("pp_size", 1)),
        device=str(server.get("device", "")),
        has_session=await _begin_session(client, url),
    )


async def _begin_session(client: EngineClient, url: str) -> bool:
    """Open the session that SGLang 0.5.21 and later demand; False where there is none."""
    try:
        await client.post(f"{url}/begin_weight_update", {})
    except EngineError as error:
        if error.status == 404:
            return False
        if error.status != 400:
            raise
        # An update that broke off has left its session open.
        await client.post(f"{url}/end_weight_update", {})
        await client.post(f"{url}/begin_weight_update", {})
    return True
