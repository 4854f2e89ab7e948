"""The real pool process against a scripted engine: its spans arrive, and lie where they should."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sod_mcore.chat import ChatRenderer
from sod_mcore.config import (
    ChatConfig,
    EngineConfig,
    RewardConfig,
    RolloutConfig,
    ServingConfig,
    TeacherConfig,
    ToolsConfig,
)
from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.pool import PoolSettings, RolloutPool
from sod_mcore.rollout.request import RolloutRequest, RolloutResult
from sod_mcore.serving.fleet import Endpoints, ModelEndpoints, process_start_ticks, write_endpoints
from sod_mcore.timeline import Span, Spans
from sod_mcore.tools.calculator import calculator_schema
from sod_mcore.trajectory import Prompt
from tests.end_to_end.programs import TEACHER

QUESTION = {"role": "user", "content": "2+3="}
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "2+3"}}</tool_call>'
TURN_SECONDS = 0.1
SCORING_SECONDS = 0.3
CLOSED_SECONDS = 0.5


class ScriptedEngine:
    """Answers a prompt with a call, and what follows that with the answer; scores what it is told.

    Scoring takes longer than a turn, so that scores wait for the teacher's only connection.
    ``served`` is when the requests for turns were there.
    """

    def __init__(self) -> None:
        self.served: list[tuple[float, float]] = []
        self._renderer = ChatRenderer.from_folder(TEACHER)
        self._prompt_length = len(self._renderer.render_prompt([QUESTION], [calculator_schema()]))

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["sampling_params"]["max_new_tokens"] == 0:
            await asyncio.sleep(SCORING_SECONDS)
            return web.json_response(self._scores(body))
        start = time.monotonic()
        await asyncio.sleep(TURN_SECONDS)
        self.served.append((start, time.monotonic()))
        return web.json_response(self._turn(len(body["input_ids"]) > self._prompt_length))

    def _turn(self, is_answer: bool) -> dict[str, Any]:
        text = r"\boxed{5}" if is_answer else CALL
        ids = self._renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, self._renderer.end_of_turn_id]
        meta = {
            "finish_reason": {"type": "stop"},
            "weight_version": "0",
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
        }
        return {"output_ids": ids, "meta_info": meta}

    def _scores(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["input_ids"][body["logprob_start_len"] :]
        entries = [[None, ids[0], None], *([-0.25, token, None] for token in ids[1:])]
        return {"meta_info": {"input_token_logprobs": entries}}


@contextmanager
def serve(engine: ScriptedEngine) -> Iterator[str]:
    """The engine's address, while a thread serves it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    application = web.Application()
    application.router.add_post("/generate", engine.generate)
    server = TestServer(application)
    asyncio.run_coroutine_threadsafe(server.start_server(), loop).result(30)
    try:
        yield str(server.make_url("")).rstrip("/")
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


def settings(directory: Path, url: str) -> PoolSettings:
    models = {
        name: ModelEndpoints(name, url, (url,), str(TEACHER), 2048, 1 << 20)
        for name in ("student", "teacher")
    }
    start = process_start_ticks(os.getpid())
    assert start is not None
    write_endpoints(Endpoints(url, models, os.getpid(), start, socket.gethostname()), directory)
    return PoolSettings(
        run_directory=directory,
        serving_directory=directory,
        student_path=TEACHER,
        serving=ServingConfig(student=EngineConfig(model_path=str(TEACHER)), max_connections=1),
        rollout=RolloutConfig(max_response_tokens=1000),
        tools=ToolsConfig(names=("calculator",)),
        reward=RewardConfig(verifiers={"sums": "math"}, workers=1),
        chat=ChatConfig(),
        teacher=TeacherConfig(),
        teacher_top_k=0,
        sources=("sums",),
    )


@dataclass(frozen=True)
class Played:
    """A batch, and what was seen of it from outside.

    Attributes:
        result: three trajectories, begun while the gate was closed.
        heard: what the pool's handle told of.
        submitted: seconds of our clock, as are the others.
        opened: when the gate was.
        collected: when the result was here.
        served: start and end of each request for a turn in the engine, in order.
    """

    result: RolloutResult
    heard: tuple[Spans, ...]
    submitted: float
    opened: float
    collected: float
    served: tuple[tuple[float, float], ...]

    @property
    def spans(self) -> list[Span]:
        """All that were heard of."""
        return [span for spans in self.heard for span in spans]

    def of_kind(self, kind: str) -> list[Span]:
        """Its spans of a kind, in the order in which they began."""
        spans = (span for span in self.spans if span.kind == kind)
        return sorted(spans, key=lambda span: span.start)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    engine, heard = ScriptedEngine(), list[Spans]()
    request = RolloutRequest((Prompt((QUESTION,), "5", "sums", "p0"),), 3, Sampling(1.0, 1.0))
    with (
        serve(engine) as url,
        RolloutPool(settings(tmp_path_factory.mktemp("run"), url), heard.append) as pool,
    ):
        pool.pause()
        submitted = time.monotonic()
        ticket = pool.submit(request)
        time.sleep(CLOSED_SECONDS)
        opened = time.monotonic()
        pool.resume()
        result = pool.collect(ticket, 60.0)
        collected = time.monotonic()
    return Played(result, tuple(heard), submitted, opened, collected, tuple(engine.served))


def test_every_part_of_every_trajectory_is_there(played: Played) -> None:
    assert [t.is_correct and t.is_scored for t in played.result.trajectories] == [True] * 3
    assert Counter((span.kind, span.label) for span in played.spans) == {
        ("generate", "p0"): 6,
        ("tool", "calculator"): 3,
        ("reward", "p0"): 3,
        ("scoring", "p0"): 3,
    }
    assert list(played.heard[-1]) == list(played.result.spans)


def test_its_clock_is_ours(played: Played) -> None:
    for span in played.spans:
        assert played.submitted < span.start <= span.end < played.collected


def test_a_turn_lasts_from_sending_to_its_answer(played: Played) -> None:
    """Neither the closed gate nor the wait for the only connection is in it."""
    turns = played.of_kind("generate")
    assert turns[0].start > played.opened
    for turn, (start, end) in zip(turns, played.served, strict=True):
        assert turn.start <= start < end <= turn.end
    for earlier, later in itertools.pairwise(turns):
        assert earlier.end <= later.start


def test_the_teacher_is_timed_in_the_same_way(played: Played) -> None:
    scores = played.of_kind("scoring")
    for earlier, later in itertools.pairwise(scores):
        assert earlier.end <= later.start
    assert all(span.end - span.start > 0.99 * SCORING_SECONDS for span in scores)
