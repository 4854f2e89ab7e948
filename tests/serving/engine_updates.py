"""Requests to real engines, updates of their weights by every way, and what an engine computes that
was changed in the middle of a request."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.messages import Generation, SamplingSettings
from sod_mcore.serving.endpoints import Endpoints
from sod_mcore.serving.weights import ways
from sod_mcore.serving.weights.disk_transfer import DiskTransfer
from sod_mcore.serving.weights.kept_groups import KeptGroups
from sod_mcore.serving.weights.tensor_check import Bucket
from sod_mcore.serving.weights.transfer import WeightTransfer
from sod_mcore.serving.weights.update import RunningRequests, SleepingEngines, update_weights

TIMEOUT = 120.0
WAYS = ("disk", "tensor", "distributed")


def generate(endpoints: Endpoints, ids: list[int], **sampling: object) -> Generation:
    """24 tokens, unless ``sampling`` says otherwise."""

    async def run() -> Generation:
        async with EngineClient(endpoints) as client:
            settings = SamplingSettings(**{"max_new_tokens": 24, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
            return await client.generate("student", ids, settings, rid="test")

    return asyncio.run(run())


def generate_during(endpoints: Endpoints, ids: list[int], update: Callable[[], None]) -> Generation:
    """400 tokens of the first engine, which is updated meanwhile."""
    sampling = SamplingSettings(max_new_tokens=400, ignore_eos=True)

    async def run() -> Generation:
        async with EngineClient(first_engine(endpoints)) as client:
            request = asyncio.create_task(client.generate("student", ids, sampling, rid="middle"))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(update)
            return await request

    return asyncio.run(run())


def first_engine(endpoints: Endpoints) -> Endpoints:
    """The student with one engine only."""
    return endpoints.reached_at("student", endpoints.model("student").engines[0])


def leave_group(url: str, name: str) -> None:
    """Let an engine leave a process group, as if it had been started again."""
    body = json.dumps({"group_name": name}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/destroy_weights_update_group", body, headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT):
        pass


def update(
    way: str,
    endpoints: Endpoints,
    folder: Path,
    version: int,
    running_requests: RunningRequests = "retract",
    sleep: SleepingEngines | None = None,
) -> None:
    """The folder's weights to the student; as tensors, in buckets of five."""
    if way == "disk":
        _send(endpoints, DiskTransfer(folder), version, running_requests, sleep)
        return
    with tensor_transfer(way, endpoints, buckets_of(folder)) as transfer:
        _send(endpoints, transfer, version, running_requests, sleep)


@contextmanager
def tensor_transfer(
    way: str, endpoints: Endpoints, buckets: Iterable[Bucket]
) -> Iterator[WeightTransfer]:
    """Of buckets by value or by broadcast, through a group of its own."""
    with closing(new_groups(endpoints)) as groups:
        yield ways.tensor_transfer(way, buckets, torch.device("cpu"), groups)


def new_groups(endpoints: Endpoints) -> KeptGroups:
    """No group yet."""
    return KeptGroups(endpoints, torch.device("cpu"), TIMEOUT)


def buckets_of(folder: Path) -> Iterator[Bucket]:
    """The folder's tensors, five at a time."""
    tensors = list(load_file(folder / "model.safetensors").items())
    for start in range(0, len(tensors), 5):
        yield tensors[start : start + 5]


def spliced_logprobs(old: Path, new: Path, token_ids: list[int], first: int) -> NDArray[np.float32]:
    """``[T, vocab]``: row t is the distribution of token t under the new weights, where the keys
    and values of all that token ``first - 1`` looks back to are of the old ones; NaN before
    ``first``."""
    ids = torch.tensor([token_ids])
    models = [Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (old, new)]
    with torch.no_grad():
        cache = models[0](ids[:, : first - 1], use_cache=True).past_key_values
        logits = models[1](ids[:, first - 1 : -1], past_key_values=cache).logits[0]
    rows: NDArray[np.float32] = torch.log_softmax(logits.double(), dim=-1).float().numpy()
    return np.concatenate([np.full((first, rows.shape[1]), np.nan, np.float32), rows])


def _send(
    endpoints: Endpoints,
    transfer: WeightTransfer,
    version: int,
    running: RunningRequests,
    sleep: SleepingEngines | None,
) -> None:
    update_weights(
        *(endpoints, "student", transfer, version, TIMEOUT), running_requests=running, sleep=sleep
    )
