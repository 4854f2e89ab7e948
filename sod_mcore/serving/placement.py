"""Whether engines can share the trainer's GPUs (``serving.placement: colocated``)."""

from __future__ import annotations

import asyncio
from typing import Any

from sod_mcore.config import ConfigError, SodConfig, serving_field
from sod_mcore.serving.client.json_http import JsonHttp
from sod_mcore.serving.endpoints import Endpoints
from sod_mcore.serving.fleet.launch import resolve_device
from sod_mcore.serving.fleet.state import read_fleet_state
from sod_mcore.serving.weights.update import TRAINED_MODEL

COLOCATED = "serving.placement is colocated"


def check_placement(config: SodConfig) -> None:
    """Refuse settings that contradict engines which sleep while the trainer works.

    Raises:
        ConfigError: one line with the mend.
    """
    serving = config.serving
    if serving is None or serving.placement == "split":
        return
    staleness = config.rollout.max_staleness
    if staleness > 0:
        raise ConfigError(
            f"{COLOCATED}, but rollout.max_staleness is {staleness}: engines cannot sample while "
            "they sleep; set rollout.max_staleness=0, or serving.placement=split"
        )
    if serving.engines_on == "ray":
        raise ConfigError(
            f"{COLOCATED}, but serving.engines_on is ray, which reserves GPUs for the engines "
            "alone; set serving.engines_on=local, or serving.placement=split"
        )
    if serving.weight_sync == "distributed" and resolve_device(serving.device) == "cuda":
        raise ConfigError(
            f"{COLOCATED}, but serving.weight_sync is distributed: NCCL takes no two ranks on one "
            "GPU; set serving.weight_sync=disk, tensor or cuda_ipc, or serving.placement=split"
        )
    for name, engine in serving.models.items():
        field = serving_field(name)
        if engine.addresses:
            raise ConfigError(
                f"{COLOCATED}, but {field}.addresses is {list(engine.addresses)}: only engines "
                "that this fleet starts, and starts again, are put to sleep; leave the addresses "
                "out, or set serving.placement=split"
            )
        if engine.max_total_tokens is None:
            raise ConfigError(
                f"{COLOCATED}, but {field}.max_total_tokens is null: its cache would take what the "
                "trainer and the other engines need; give a number of tokens (docs/placement.md)"
            )


def check_engines_can_sleep(config: SodConfig, endpoints: Endpoints, timeout: float) -> None:
    """Refuse engines that were started by another configuration.

    Args:
        timeout: longest wait in seconds for one answer.

    Raises:
        ConfigError: an engine is none of this fleet's, or has no flag that lets it sleep.
        EngineError: an engine did not answer.
        FleetError: the fleet has ended.
    """
    if config.serving is None or config.serving.placement == "split":
        return
    if endpoints.is_elsewhere:
        raise ConfigError(
            f"{COLOCATED}, but the engines run on {endpoints.hostname}: rank 0 must be on their "
            "machine; start it there, or set serving.placement=split"
        )
    state = read_fleet_state(config.serving_directory)
    for name, model in endpoints.models.items():
        ours = {s.url for s in state.servers if s.role == "engine" and s.model == name}
        infos = asyncio.run(_server_infos(model.engines, timeout))
        for url, info in infos.items():
            if url not in ours or not _can_sleep(name, info):
                raise ConfigError(
                    f"{COLOCATED}, but {url} of {name} was started by another configuration and "
                    f"cannot sleep; start the engines again with this one"
                )


async def _server_infos(engines: tuple[str, ...], timeout: float) -> dict[str, dict[str, Any]]:
    http = JsonHttp(keep_alive=False)
    try:
        return {url: await http.get(f"{url}/server_info", timeout) for url in engines}
    finally:
        await http.close()


def _can_sleep(model: str, info: dict[str, Any]) -> bool:
    """Without a GPU nothing is released, and no flag is needed."""
    if info.get("device") == "cpu":
        return True
    keeps_weights = model == TRAINED_MODEL or info.get("enable_weights_cpu_backup")
    return bool(info.get("enable_memory_saver") and keeps_weights)
