"""When requests are retried, refused, given up and aborted, against a scripted server."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.client.messages import Generation, parse_weight_version
from sod_mcore.serving.client.recovery import Backoff
from sod_mcore.serving.client.scoring import Scores, ScoringError, score
from sod_mcore.timeline import SpanRecorder
from tests.serving.scripted_generation import (
    SAMPLING,
    VOCAB_SIZE,
    ScriptedEngine,
    answers,
    connect,
    generated,
    never,
    scored,
    until,
)


def generate(engine: ScriptedEngine, rid: str = "r", **options: Any) -> Generation:
    async def run() -> Generation:
        async with connect(engine, **options) as client:
            return await client.generate("student", [1, 2], SAMPLING, rid=rid)

    return asyncio.run(run())


def test_an_aborted_request_is_no_turn() -> None:
    async def abort(body: dict[str, Any]) -> web.Response:
        return web.json_response(generated([7], finish_reason={"type": "abort"}))

    with pytest.raises(EngineError, match="aborted") as caught:
        generate(ScriptedEngine(abort))
    assert caught.value.retryable


def test_what_comes_back() -> None:
    generation = generate(ScriptedEngine(answers(200)))
    np.testing.assert_array_equal(generation.token_ids, np.array([7, 8, 9], np.int32))
    assert generation.token_ids.dtype == np.int32
    assert generation.logprobs.dtype == np.float32
    assert generation.weight_version == 4
    assert generation.weight_versions.tolist() == [3, 4, 4]
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int) -> None:
    engine = ScriptedEngine(answers(status, status, 200))
    assert len(generate(engine).token_ids) == 3
    # A new id each time: the engine may still be at work on the one before.
    assert [request["rid"] for request in engine.requests] == ["r", "r.2", "r.3"]


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_is_refused_is_not_tried_again(status: int) -> None:
    engine = ScriptedEngine(answers(status))
    with pytest.raises(EngineError, match=str(status)) as caught:
        generate(engine)
    assert not caught.value.retryable
    assert len(engine.requests) == 1


def test_giving_up() -> None:
    engine = ScriptedEngine(answers(503))
    with pytest.raises(EngineError, match="gave up after 4 tries") as caught:
        generate(engine, attempts=4)
    assert caught.value.retryable
    assert len(engine.requests) == 4


def test_waits_grow_to_a_limit() -> None:
    backoff = Backoff(first_seconds=0.25, longest_seconds=8.0)
    longest = [0.25, 0.5, 1, 2, 4, 8, 8, 8]
    for failures, seconds in enumerate(longest, start=1):
        waits = [backoff.seconds(failures) for _ in range(200)]
        assert seconds / 2 <= min(waits) < max(waits) <= seconds
    assert backoff.seconds(10**6) <= 8.0


def test_deadline_aborts() -> None:
    engine = ScriptedEngine(never)
    with pytest.raises(EngineError, match=r"no answer within 0\.2 s"):
        generate(engine, request_timeout_seconds=0.2)
    assert engine.aborted == ["r"]


def test_deadline_covers_all_tries() -> None:
    engine = ScriptedEngine(answers(429))
    with pytest.raises(EngineError, match="no answer within"):
        generate(engine, request_timeout_seconds=0.3, attempts=1000)
    # Pauses of 0.005 s at least; how many fit depends on the machine.
    assert 2 < len(engine.requests) < 100


def test_cancellation_aborts() -> None:
    engine = ScriptedEngine(never)

    async def run() -> None:
        async with connect(engine) as client:
            task = asyncio.create_task(client.generate("student", [1], SAMPLING, rid="mine"))
            await until(lambda: bool(engine.requests))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert engine.aborted == ["mine"]


def test_open_requests_are_bounded() -> None:
    async def slow(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(0.02)
        return web.json_response(generated([7]))

    engine = ScriptedEngine(slow)

    async def run() -> None:
        async with connect(engine, max_connections=3) as client:
            await asyncio.gather(
                *(client.generate("student", [1], SAMPLING, rid=str(n)) for n in range(12))
            )

    asyncio.run(run())
    assert engine.most_open == 3
    assert len(engine.requests) == 12


def test_a_request_that_waits_for_a_connection_is_not_in_flight() -> None:
    served: list[tuple[float, float]] = []

    async def slow(body: dict[str, Any]) -> web.Response:
        start = time.monotonic()
        await asyncio.sleep(0.1)
        served.append((start, time.monotonic()))
        return web.json_response(generated([7]))

    recorder = SpanRecorder()

    async def run() -> None:
        async with connect(ScriptedEngine(slow), max_connections=1) as client:
            requests = [
                client.generate("student", [1], SAMPLING, rid=rid, in_flight=recorder.span(rid))
                for rid in ("a", "b", "c")
            ]
            await asyncio.gather(*requests)

    asyncio.run(run())
    spans = sorted(recorder.take(), key=lambda span: span.start)
    for span, (start, end) in zip(spans, served, strict=True):
        assert span.start <= start < end <= span.end
    for earlier, later in itertools.pairwise(spans):
        assert earlier.end <= later.start


def test_all_tries_of_a_request_are_one_flight_also_of_one_that_fails() -> None:
    recorder = SpanRecorder()

    async def run(engine: ScriptedEngine) -> None:
        async with connect(engine, attempts=3) as client:
            in_flight = recorder.span("generate")
            await client.generate("student", [1], SAMPLING, rid="r", in_flight=in_flight)

    asyncio.run(run(ScriptedEngine(answers(503, 200))))
    with pytest.raises(EngineError, match="gave up"):
        asyncio.run(run(ScriptedEngine(answers(503))))
    assert len(recorder.take()) == 2


@pytest.mark.parametrize("ids", [[], [VOCAB_SIZE], [-1], [[1, 2]], [1.5]])
def test_ids_that_would_kill_an_engine_are_never_sent(ids: list[Any]) -> None:
    engine = ScriptedEngine(answers(200))

    async def run() -> None:
        async with connect(engine) as client:
            await client.generate("student", ids, SAMPLING, rid="r")

    with pytest.raises(ValueError, match="token id"):
        asyncio.run(run())
    assert not engine.requests


def test_logprobs_of_other_tokens() -> None:
    async def wrong(body: dict[str, Any]) -> web.Response:
        return web.json_response(
            generated([7, 8], output_token_logprobs=[[-1, 7, None], [-1, 9, None]])
        )

    with pytest.raises(EngineError, match="log-probs of other tokens"):
        generate(ScriptedEngine(wrong))


def test_weight_versions() -> None:
    assert parse_weight_version("default") == 0
    assert parse_weight_version("12") == 12
    with pytest.raises(EngineError, match="not a number"):
        parse_weight_version("step-3")


IDS = [10, 11, 12, 13]
RIGHT = [[None, 11, None], [-1.0, 12, None], [-2.0, 13, None]]


def score_answer(meta: dict[str, Any], top_k: int = 0) -> Scores:
    async def handler(body: dict[str, Any]) -> web.Response:
        assert body["logprob_start_len"] == 1
        return web.json_response({"meta_info": meta})

    async def run() -> Scores:
        async with connect(ScriptedEngine(handler)) as client:
            return await score(client, "student", IDS, 2, top_k)

    return asyncio.run(run())


def test_scores() -> None:
    scores = score_answer({"input_token_logprobs": RIGHT})
    np.testing.assert_array_equal(scores.logprobs, np.array([np.nan, np.nan, -1, -2], np.float32))
    assert scores.topk_ids is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (RIGHT[1:], "2 scores came back for 3 positions"),
        ([*RIGHT, [-3.0, 14, None]], "4 scores came back for 3 positions"),
        ([RIGHT[0], RIGHT[2], RIGHT[1]], "about token 13, but token 12 was sent"),
        ([RIGHT[0], [-1.0, 0, None], RIGHT[2]], "about token 0, but token 12 was sent"),
        ([RIGHT[0], RIGHT[1], [None, 13, None]], "not finite"),
        ([RIGHT[0], RIGHT[1], []], "cannot be read"),
    ],
)
def test_scores_that_cannot_be_trusted(entries: list[Any], message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        score_answer({"input_token_logprobs": entries})


def test_candidates_as_nested_lists() -> None:
    rows = [None, [[-0.1, 5, None], [-3.0, 6, None]], [[-0.2, 7, None], [-2.0, 8, None]]]
    scores = score_answer({"input_token_logprobs": RIGHT, "input_top_logprobs": rows}, top_k=2)
    assert scores.topk_ids is not None
    assert scores.topk_logprobs is not None
    assert scores.topk_ids.tolist() == [[-1, -1], [-1, -1], [5, 6], [7, 8]]
    np.testing.assert_allclose(scores.topk_logprobs[2:], [[-0.1, -3.0], [-0.2, -2.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([None, [[-0.1, 5, None]]], "for 2 positions"),
        ([None, [[-0.1, 5, None]], [[-0.1, 5, None]]], "for 2 positions"),
        ([None, [[None, 5, None]] * 2, [[-0.1, 5, None]] * 2], "not finite"),
        ([None, [[-0.1, 5, None]] * 2, [[-0.1, 5, None]]], "cannot be read"),
    ],
)
def test_candidates_that_cannot_be_trusted(rows: list[Any], message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        score_answer({"input_token_logprobs": RIGHT, "input_top_logprobs": rows}, top_k=2)


def test_all_samples_of_a_prompt_are_scored_by_one_engine() -> None:
    """It has the prompt in its prefix cache."""

    async def answer(body: dict[str, Any]) -> web.Response:
        return web.json_response(scored(body))

    engines = [ScriptedEngine(answer) for _ in range(3)]

    async def run() -> None:
        async with connect(*engines) as client:
            for last in range(2):
                for first in range(12):
                    await score(client, "student", [first, 5, last], 2)

    asyncio.run(run())
    prompts = [[request["input_ids"][0] for request in engine.requests] for engine in engines]
    assert sorted(prompt for own in prompts for prompt in own) == sorted(2 * list(range(12)))
    for own in prompts:
        assert len(own) == 8, "new prompts are spread evenly"
        assert sorted(own) == sorted(2 * own[:4])
