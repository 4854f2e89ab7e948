"""The client, the scoring, the front door and the weight update against real SGLang engines.

What the engines should compute comes from Hugging Face in float32.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import aiohttp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sod_mcore.config import EngineConfig, ServingConfig
from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.client.messages import SamplingSettings
from sod_mcore.serving.client.scoring import Scores, score
from sod_mcore.serving.endpoints import Endpoints
from sod_mcore.serving.fleet.state import read_fleet_state
from sod_mcore.serving.sleep import EngineSleep
from sod_mcore.serving.weights import update as weights
from sod_mcore.serving.weights.disk_transfer import DiskTransfer
from sod_mcore.serving.weights.distributed_transfer import DistributedTransfer
from sod_mcore.serving.weights.kept_groups import KeptGroups
from sod_mcore.serving.weights.tensor_transfer import TensorTransfer
from sod_mcore.serving.weights.transfer import WeightUpdateError
from sod_mcore.serving.weights.update import RunningRequests
from tests.serving.conftest import START_SECONDS, LiveFleet
from tests.serving.engine_updates import (
    TIMEOUT,
    WAYS,
    buckets_of,
    first_engine,
    generate,
    generate_during,
    leave_group,
    new_groups,
    spliced_logprobs,
    tensor_transfer,
    update,
)
from tests.serving.processes import leader_at
from tests.serving.tiny_models import CONTEXT_LENGTH, VOCAB_SIZE, random_ids, reference_logprobs

TOLERANCE = 1e-5


def score_once(
    endpoints: Endpoints, model: str, ids: list[int], prompt_length: int, top_k: int = 0
) -> Scores:
    async def run() -> Scores:
        async with EngineClient(endpoints) as client:
            return await score(client, model, ids, prompt_length, top_k)

    return asyncio.run(run())


@pytest.mark.parametrize(("length", "prompt_length"), [(2, 1), (60, 1), (60, 59), (300, 120)])
def test_scores_are_the_models(live_fleet: LiveFleet, length: int, prompt_length: int) -> None:
    ids = random_ids(length, seed=length)
    for _ in range(2):  # the second time the prompt comes from the prefix cache
        scores = score_once(live_fleet.endpoints, "teacher", ids, prompt_length, top_k=8)
        expected = reference_logprobs(live_fleet.teacher, ids)
        wanted = np.arange(prompt_length, length)
        assert np.isnan(scores.logprobs[:prompt_length]).all()
        np.testing.assert_allclose(
            scores.logprobs[wanted], expected[wanted, np.array(ids)[wanted]], atol=TOLERANCE
        )
        assert scores.topk_ids is not None
        assert scores.topk_logprobs is not None
        assert (scores.topk_ids[:prompt_length] == -1).all()
        assert np.isnan(scores.topk_logprobs[:prompt_length]).all()
        np.testing.assert_allclose(
            scores.topk_logprobs[wanted], np.sort(expected[wanted])[:, :-9:-1], atol=TOLERANCE
        )
        np.testing.assert_allclose(
            np.take_along_axis(expected[wanted], scores.topk_ids[wanted].astype(np.int64), axis=1),
            scores.topk_logprobs[wanted],
            atol=TOLERANCE,
        )


def test_the_last_token_of_the_vocabulary_is_scored(live_fleet: LiveFleet) -> None:
    """The engine labels its score as that of token 0."""
    ids = [5, VOCAB_SIZE - 1, 6, 0, VOCAB_SIZE - 1]
    scores = score_once(live_fleet.endpoints, "teacher", ids, 1)
    expected = reference_logprobs(live_fleet.teacher, ids)[np.arange(1, 5), ids[1:]]
    np.testing.assert_allclose(scores.logprobs[1:], expected, atol=TOLERANCE)


def test_nothing_to_score(live_fleet: LiveFleet) -> None:
    scores = score_once(live_fleet.endpoints, "teacher", [5, 6, 7], 3, top_k=4)
    assert np.isnan(scores.logprobs).all()
    assert scores.topk_ids is not None
    assert scores.topk_ids.shape == (3, 4)


@pytest.mark.parametrize(
    ("sampling", "temperature"),
    [
        ({"temperature": 1.0}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 1.6}, 1.6),
        ({"temperature": 0.7, "top_p": 0.6}, 0.7),  # the whole distribution, not the nucleus
        ({"temperature": 0.0}, 1.0),
    ],
)
def test_sampled_logprobs_are_tempered(
    live_fleet: LiveFleet, sampling: dict[str, float], temperature: float
) -> None:
    ids = random_ids(40, seed=4)
    generation = generate(live_fleet.endpoints, ids, **sampling)
    whole = ids + generation.token_ids.tolist()
    expected = reference_logprobs(live_fleet.student, whole, temperature)
    positions = np.arange(len(ids), len(whole))
    np.testing.assert_allclose(
        generation.logprobs, expected[positions, generation.token_ids], atol=2 * TOLERANCE
    )
    assert generation.finish_reason == "length"
    if sampling["temperature"] == 0.0:
        assert (expected[positions].argmax(axis=1) == generation.token_ids).all()


def test_the_stop_token_is_returned(live_fleet: LiveFleet) -> None:
    ids = random_ids(20, seed=5)
    stops = tuple(range(4, 512, 3))
    generation = generate(
        live_fleet.endpoints, ids, max_new_tokens=300, stop_token_ids=stops, ignore_eos=False
    )
    assert generation.finish_reason == "stop"
    assert generation.token_ids[-1] in {*stops, 2}
    assert not set(generation.token_ids[:-1].tolist()) & {*stops, 2}
    assert len(generation.logprobs) == len(generation.token_ids)


def test_models_are_never_mixed(live_fleet: LiveFleet) -> None:
    """64 requests at once through the one address, alternating between the models."""
    sequences = [random_ids(30, seed=100 + n) for n in range(8)]
    folders = {"student": live_fleet.student, "teacher": live_fleet.teacher}
    expected = {
        name: [reference_logprobs(folder, ids) for ids in sequences]
        for name, folder in folders.items()
    }
    requests = [(("student", "teacher")[n % 2], (n // 2) % 8) for n in range(64)]

    async def ask(session: aiohttp.ClientSession, name: str, which: int) -> list[float]:
        body = {
            "model": name,
            "input_ids": sequences[which],
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        url = f"{live_fleet.endpoints.front_door}/generate"
        async with session.post(url, json=body) as response:
            assert response.status == 200, await response.text()
            entries = (await response.json())["meta_info"]["input_token_logprobs"]
            return [entry[0] for entry in entries[1:]]

    async def ask_all() -> list[list[float]]:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT)) as session:
            return await asyncio.gather(*(ask(session, *request) for request in requests))

    for (name, which), values in zip(requests, asyncio.run(ask_all()), strict=True):
        ids = np.array(sequences[which])[1:]
        right = expected[name][which][np.arange(1, 30), ids]
        np.testing.assert_allclose(values, right, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_new_weights_reach_every_engine(live_fleet: LiveFleet, way: str) -> None:
    endpoints, ids = live_fleet.endpoints, random_ids(50, seed=6)
    positions = np.arange(1, 50)

    def check(folder: Path, version: int) -> None:
        expected = reference_logprobs(folder, ids)[positions, np.array(ids)[1:]]
        rows = weights.probe_logprobs(endpoints, "student", ids, TIMEOUT)
        assert rows.shape == (2, 50)
        for row in rows:
            np.testing.assert_allclose(row[1:], expected, atol=TOLERANCE)
        assert weights.weight_versions(endpoints, "student", TIMEOUT) == (version, version)
        assert generate(endpoints, ids).weight_version == version

    before = weights.weight_versions(endpoints, "student", TIMEOUT)[0]
    update(way, endpoints, live_fleet.other_student, before + 1)
    check(live_fleet.other_student, before + 1)
    assert weights.weight_versions(endpoints, "teacher", TIMEOUT) == (0,)
    update(way, endpoints, live_fleet.student, before + 2)
    check(live_fleet.student, before + 2)


def test_tensors_in_bfloat16_reach_engines_in_float32(
    live_fleet: LiveFleet, tmp_path: Path
) -> None:
    rounded = shutil.copytree(live_fleet.other_student, tmp_path / "rounded")
    tensors = load_file(rounded / "model.safetensors")
    narrow = [(name, tensor.bfloat16()) for name, tensor in tensors.items()]
    save_file({name: tensor.float() for name, tensor in narrow}, rounded / "model.safetensors")
    ids, endpoints = random_ids(50, seed=8), live_fleet.endpoints
    weights.update_weights(endpoints, "student", TensorTransfer([narrow]), 20, TIMEOUT)
    expected = reference_logprobs(rounded, ids)[np.arange(1, 50), np.array(ids)[1:]]
    for row in weights.probe_logprobs(endpoints, "student", ids, TIMEOUT):
        np.testing.assert_allclose(row[1:], expected, atol=TOLERANCE)
    update("tensor", endpoints, live_fleet.student, 21)


@pytest.mark.parametrize("way", ["tensor", "distributed"])
def test_an_update_that_breaks_off_is_mended_by_the_next(live_fleet: LiveFleet, way: str) -> None:
    """The engines then hold some weights of each version; they stay paused and keep their
    version."""
    endpoints, ids = live_fleet.endpoints, random_ids(50, seed=9)
    before = weights.weight_versions(endpoints, "student", TIMEOUT)
    new = list(load_file(live_fleet.other_student / "model.safetensors").items())
    buckets = [new[:8], [(new[8][0], torch.zeros(3, 3))]]
    with (
        tensor_transfer(way, endpoints, buckets) as transfer,
        pytest.raises(WeightUpdateError, match=r"has shape \(3, 3\)"),
    ):
        weights.update_weights(endpoints, "student", transfer, before[0] + 1, TIMEOUT)
    assert weights.weight_versions(endpoints, "student", TIMEOUT) == before
    with pytest.raises(EngineError, match="no answer within 3 s"):
        weights.probe_logprobs(endpoints, "student", ids, 3.0)
    update(way, endpoints, live_fleet.student, before[0] + 2)
    assert weights.weight_versions(endpoints, "student", TIMEOUT) == (before[0] + 2,) * 2
    expected = reference_logprobs(live_fleet.student, ids)[np.arange(1, 50), np.array(ids)[1:]]
    for row in weights.probe_logprobs(endpoints, "student", ids, TIMEOUT):
        np.testing.assert_allclose(row[1:], expected, atol=TOLERANCE)


def test_a_process_group_is_kept_while_every_engine_is_in_it(live_fleet: LiveFleet) -> None:
    """An engine that was started again is not; here one only leaves."""
    endpoints, names = live_fleet.endpoints, []
    before = weights.weight_versions(endpoints, "student", TIMEOUT)[0]
    with closing(new_groups(endpoints)) as groups:
        for version in range(before + 1, before + 4):
            broadcast(live_fleet, groups, version)
            names.append(groups.names["student"])
            if version == before + 2:
                leave_group(endpoints.model("student").engines[1], names[-1])
    assert names[0] == names[1] != names[2]
    assert weights.weight_versions(endpoints, "student", TIMEOUT) == (before + 3,) * 2


def broadcast(live_fleet: LiveFleet, groups: KeptGroups, version: int) -> None:
    """The first student's weights through a group that is kept."""
    transfer = DistributedTransfer(buckets_of(live_fleet.student), groups)
    weights.update_weights(live_fleet.endpoints, "student", transfer, version, TIMEOUT)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("running_requests", ["retract", "in_place"])
def test_new_weights_in_the_middle_of_a_request(
    live_fleet: LiveFleet, way: str, running_requests: RunningRequests
) -> None:
    """A request that runs during the update says which version sampled which token; in place, the
    new weights look back to the keys and values of the old ones."""
    endpoints, ids = live_fleet.endpoints, random_ids(10, seed=7)
    old, new = live_fleet.student, live_fleet.other_student
    before = weights.weight_versions(endpoints, "student", TIMEOUT)[0]
    generation = generate_during(
        endpoints, ids, lambda: update(way, endpoints, new, before + 1, running_requests)
    )
    update(way, endpoints, old, before + 2)
    assert len(generation.token_ids) == 400
    assert set(generation.weight_versions.tolist()) == {before, before + 1}
    assert (np.diff(generation.weight_versions) >= 0).all()
    whole = ids + generation.token_ids.tolist()
    first = len(ids) + int((generation.weight_versions == before).sum())
    expected = reference_logprobs(old, whole)
    retracted, in_place = reference_logprobs(new, whole), spliced_logprobs(old, new, whole, first)
    expected[first:] = (in_place if running_requests == "in_place" else retracted)[first:]
    assert np.abs(in_place[first:] - retracted[first:]).max() > 0.1
    positions = np.arange(len(ids), len(whole))
    np.testing.assert_allclose(
        generation.logprobs, expected[positions, generation.token_ids], atol=5 * TOLERANCE
    )


def test_in_place_the_prefix_cache_stays_only_while_a_request_runs(live_fleet: LiveFleet) -> None:
    """SGLang refuses to empty it then, and what it holds of other prompts stays with it."""
    endpoints, ids = live_fleet.endpoints, random_ids(40, seed=11)
    before = weights.weight_versions(endpoints, "student", TIMEOUT)[0]

    def cached_tokens() -> int:
        return generate(first_engine(endpoints), ids, max_new_tokens=1).cached_tokens

    def update_in_place(version: int) -> None:
        update("disk", endpoints, live_fleet.student, version, "in_place")

    cached_tokens()
    assert cached_tokens() > 0
    update_in_place(before + 1)
    assert cached_tokens() == 0
    generate_during(endpoints, random_ids(10, seed=12), lambda: update_in_place(before + 2))
    assert cached_tokens() > 0
    update("disk", endpoints, live_fleet.student, before + 3)
    assert cached_tokens() == 0


def test_damaged_weights_never_reach_an_engine(live_fleet: LiveFleet, tmp_path: Path) -> None:
    """An engine would die of them."""
    endpoints = live_fleet.endpoints
    damaged = shutil.copytree(live_fleet.other_student, tmp_path / "damaged")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightUpdateError, match=r"model\.safetensors is damaged"):
        update("disk", endpoints, damaged, 50)
    assert generate(endpoints, random_ids(5, seed=1)).weight_version != 50


def test_only_the_student_changes(live_fleet: LiveFleet) -> None:
    with pytest.raises(ValueError, match="only the weights of 'student'"):
        weights.update_weights(
            live_fleet.endpoints, "teacher", DiskTransfer(live_fleet.other_student), 1, TIMEOUT
        )


def test_a_request_that_does_not_fit(live_fleet: LiveFleet) -> None:
    with pytest.raises(EngineError, match="maximum context length of 512") as caught:
        generate(live_fleet.endpoints, random_ids(500, seed=1), max_new_tokens=100)
    assert not caught.value.retryable
    with pytest.raises(EngineError, match="longer than") as caught:
        score_once(live_fleet.endpoints, "teacher", random_ids(CONTEXT_LENGTH + 8, seed=1), 1)
    assert not caught.value.retryable


def test_the_longest_input(live_fleet: LiveFleet) -> None:
    longest = live_fleet.endpoints.model("teacher").longest_input
    assert longest < CONTEXT_LENGTH
    score_once(live_fleet.endpoints, "teacher", random_ids(longest, seed=1), 1)
    with pytest.raises(EngineError, match="exceeds the maximum allowed length") as caught:
        score_once(live_fleet.endpoints, "teacher", random_ids(longest + 1, seed=1), 1)
    assert not caught.value.retryable


def test_a_cancelled_request_ends_in_the_engine(live_fleet: LiveFleet) -> None:
    endpoints = live_fleet.endpoints
    sampling = SamplingSettings(max_new_tokens=500, ignore_eos=True)

    async def run() -> list[int]:
        async with EngineClient(endpoints) as client:
            tasks = [
                asyncio.create_task(client.generate("student", [5], sampling, rid=f"cancel{n}"))
                for n in range(8)
            ]
            await asyncio.sleep(0.2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.2)
            urls = endpoints.model("student").engines
            return [await _running_requests(client, url) for url in urls]

    assert asyncio.run(run()) == [0, 0]


async def _running_requests(client: EngineClient, url: str) -> int:
    loads = (await client.get(f"{url}/v1/loads"))["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def test_the_front_door_streams_and_chats(live_fleet: LiveFleet) -> None:
    async def run() -> tuple[list[dict[str, object]], dict[str, object], tuple[int, str]]:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT)) as session:
            door = live_fleet.endpoints.front_door
            sampling = {"max_new_tokens": 8, "ignore_eos": True}
            body = {"model": "teacher", "input_ids": [5, 6], "sampling_params": sampling}
            async with session.post(f"{door}/generate", json=body | {"stream": True}) as response:
                assert response.content_type == "text/event-stream"
                lines = [line.decode().strip() async for line in response.content]
            events = [
                json.loads(line.removeprefix("data: "))
                for line in lines
                if line.startswith("data: ") and "[DONE]" not in line
            ]
            chat = {
                "model": "student",
                "messages": [{"role": "user", "content": "w10 w11"}],
                "max_tokens": 4,
            }
            async with session.post(f"{door}/v1/chat/completions", json=chat) as response:
                assert response.status == 200, await response.text()
                answer = await response.json()
            async with session.post(f"{door}/generate", json=body | {"model": "x"}) as response:
                return events, answer, (response.status, await response.text())

    events, answer, unknown = asyncio.run(run())
    assert len(events) > 1
    assert answer["model"] == "student"
    assert unknown[0] == 404
    assert "student, teacher" in unknown[1]


def test_a_paused_engine_tells_that_it_lives(live_fleet: LiveFleet) -> None:
    """The fleet asks so; /health of a paused engine is 503 after 20 s, as if it were dead."""
    url = live_fleet.endpoints.model("student").engines[0]

    async def run() -> None:
        async with EngineClient(live_fleet.endpoints, request_timeout_seconds=15.0) as client:
            await client.post(f"{url}/pause_generation", {"mode": "retract"})
            try:
                assert (await client.get(f"{url}/server_info"))["internal_states"]
            finally:
                await client.post(f"{url}/continue_generation", {})

    asyncio.run(run())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("running_requests", ["retract", "in_place"])
def test_sleeping_engines_wake_with_new_weights(
    live_fleet: LiveFleet, way: str, running_requests: RunningRequests
) -> None:
    """On a CPU no memory is released, but a wrong order ends these engines as well. A request that
    comes meanwhile waits, and is answered by the weights that the engines wake with."""
    endpoints, ids = live_fleet.endpoints, random_ids(40, seed=21)
    teacher = score_once(endpoints, "teacher", ids, 1).logprobs
    settings = ServingConfig(student=EngineConfig(model_path=""), placement="colocated")
    sleep = EngineSleep(endpoints, settings, live_fleet.directory)
    before = weights.weight_versions(endpoints, "student", TIMEOUT)[0]
    folders = (live_fleet.other_student, live_fleet.student)
    with ThreadPoolExecutor(1) as executor:
        for version, folder in enumerate(folders, start=before + 1):
            sleep.sleep()
            request = executor.submit(generate, endpoints, ids, temperature=0.0)
            for model in endpoints.models.values():
                for url in model.engines:
                    with urllib.request.urlopen(f"{url}/server_info", timeout=20) as answer:
                        assert answer.status == 200, "the fleet's sign of life"
            assert not request.done()
            sleep.end_training()
            update(way, endpoints, folder, version, running_requests, sleep)
            sleep.wake_others()
            sampled = request.result(timeout=60)
            assert set(sampled.weight_versions) == {version}
            whole = ids + sampled.token_ids.tolist()
            expected = reference_logprobs(folder, whole)[len(ids) :]
            assert (expected.argmax(axis=1) == sampled.token_ids).all()
            assert (generate(endpoints, ids, temperature=0.0).token_ids == sampled.token_ids).all()
            again = score_once(endpoints, "teacher", ids, 1).logprobs
            np.testing.assert_allclose(again[1:], teacher[1:], atol=TOLERANCE)
    restarts = {server.restarts for server in read_fleet_state(live_fleet.directory).servers}
    assert restarts == {0}


def test_an_engine_and_a_router_that_are_killed_come_back(live_fleet: LiveFleet) -> None:
    """Requests go on elsewhere; the engine has its first weights then, and is not used before it
    has got those that are required. The last test here, for it takes an engine's start."""
    endpoints, ids = live_fleet.endpoints, random_ids(20, seed=10)
    student = endpoints.model("student")
    sampling = SamplingSettings(max_new_tokens=400, ignore_eos=True)
    survivor, victim = student.engines
    version = 1 + max(weights.weight_versions(endpoints, "student", TIMEOUT))
    groups = new_groups(endpoints)
    broadcast(live_fleet, groups, version)
    first_group = groups.names["student"]

    async def versions_of_many(client: EngineClient) -> set[int]:
        prompts = [[*ids, n] for n in range(4, 36)]
        requests = (client.generate("student", p, sampling, rid=uuid4().hex) for p in prompts)
        return {generation.weight_version for generation in await asyncio.gather(*requests)}

    async def start_load(client: EngineClient) -> asyncio.Task[set[int]]:
        """Requests of which the victim has some; after a restart it is used again in a while."""
        while True:
            load = asyncio.create_task(versions_of_many(client))
            while not load.done():
                if client._replicas["student"].all[1].outstanding_tokens:
                    return load
                await asyncio.sleep(0.01)
            await load

    async def run() -> None:
        async with EngineClient(endpoints) as client, asyncio.timeout(START_SECONDS):
            client.require_version("student", version)
            load = await start_load(client)
            for url in (victim, student.route):
                os.kill(leader_at(endpoints.pid, url), signal.SIGKILL)
            assert await load == {version}
            counters = client.counters("student")
            assert counters.connection_failures == counters.retries > 0
            state = read_fleet_state(live_fleet.directory)
            while state.incarnations("student") != {survivor: 1, victim: 2}:
                await asyncio.sleep(0.2)
                state = read_fleet_state(live_fleet.directory)
            assert await versions_of_many(client) == {version}
            await asyncio.to_thread(broadcast, live_fleet, groups, version + 1)
            client.require_version("student", version + 1)
            assert await (await start_load(client)) == {version + 1}

    with closing(groups):
        asyncio.run(run())
        assert groups.names["student"] != first_group, "the engine is no member of that one"
    scores = score_once(endpoints.reached_at("student", student.route), "student", ids, 1)
    expected = reference_logprobs(live_fleet.student, ids)[np.arange(1, 20), np.array(ids)[1:]]
    np.testing.assert_allclose(scores.logprobs[1:], expected, atol=TOLERANCE)
