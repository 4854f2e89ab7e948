"""An engine that plays both models of the pool process, and the settings of a pool that asks it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from sod_mcore.rollout.pool import PoolSettings
from sod_mcore.serving.endpoints import (
    Endpoints,
    ModelEndpoints,
    process_start_ticks,
    write_endpoints,
)
from sod_mcore.tools.calculator import calculator_schema
from tests.end_to_end.programs import TEACHER

QUESTION = {"role": "user", "content": "2+3="}
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "2+3"}}</tool_call>'
TURN_SECONDS = 0.1
SCORING_SECONDS = 0.3


class ScriptedEngine:
    """Answers a prompt with a call, and what follows that with the answer; scores what it is told.

    Scoring takes longer than a turn, so that scores wait for the teacher's only connection.
    Attributes:
        served: when the requests for turns were there.
        open_turns: requests for turns that are there now.
        aborted: names of requests that nobody waits for any more.
        version: of its weights.
        turn_seconds: how long a turn takes.
    """

    def __init__(self, turn_seconds: float = TURN_SECONDS) -> None:
        self.served: list[tuple[float, float]] = []
        self.aborted: list[str] = []
        self.version = 0
        self.turn_seconds = turn_seconds
        self.open_turns = 0
        self._renderer = ChatRenderer.from_folder(TEACHER)
        self._prompt_length = len(self._renderer.render_prompt([QUESTION], [calculator_schema()]))

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["sampling_params"]["max_new_tokens"] == 0:
            await asyncio.sleep(SCORING_SECONDS)
            return web.json_response(self._scores(body))
        start = time.monotonic()
        self.open_turns += 1
        try:
            await asyncio.sleep(self.turn_seconds)
        finally:
            self.open_turns -= 1
        self.served.append((start, time.monotonic()))
        return web.json_response(self._turn(len(body["input_ids"]) > self._prompt_length))

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(self.version)})

    def _turn(self, is_answer: bool) -> dict[str, Any]:
        text = r"\boxed{5}" if is_answer else CALL
        ids = self._renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, self._renderer.end_of_turn_id]
        meta = {
            "finish_reason": {"type": "stop"},
            "weight_version": str(self.version),
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
    application.router.add_post("/abort_request", engine.abort)
    application.router.add_get("/health", engine.health)
    application.router.add_get("/model_info", engine.model_info)
    server = TestServer(application)
    asyncio.run_coroutine_threadsafe(server.start_server(), loop).result(30)
    try:
        yield str(server.make_url("")).rstrip("/")
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


def settings(
    directory: Path,
    url: str,
    connections: int = 1,
    teacher_url: str | None = None,
    **serving: Any,
) -> PoolSettings:
    """A pool on that engine, with so many connections to each model.

    Args:
        teacher_url: of another engine that scores.
        serving: further settings of that section.
    """
    models = {
        name: ModelEndpoints(name, at, (at,), str(TEACHER), 2048, 1 << 20)
        for name, at in (("student", url), ("teacher", teacher_url or url))
    }
    start = process_start_ticks(os.getpid())
    assert start is not None
    write_endpoints(Endpoints(url, models, os.getpid(), start, socket.gethostname()), directory)
    return PoolSettings(
        run_directory=directory,
        serving_directory=directory,
        student_path=TEACHER,
        serving=ServingConfig(
            student=EngineConfig(model_path=str(TEACHER)), max_connections=connections, **serving
        ),
        rollout=RolloutConfig(max_response_tokens=1000),
        tools=ToolsConfig(names=("calculator",)),
        reward=RewardConfig(verifiers={"sums": "math"}, workers=1),
        chat=ChatConfig(),
        teacher=TeacherConfig(),
        teacher_top_k=0,
        sources=("sums",),
    )
