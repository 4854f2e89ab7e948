"""An engine over HTTP whose answers depend on the input ids alone, and who asked for what.

It plays a student that calls the calculator now and then and answers with a sum, right or wrong,
and a teacher that scores. As a real engine it ends a request when it is told to.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
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
from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.pool import PoolSettings
from sod_mcore.rollout.request import RolloutRequest
from sod_mcore.serving.endpoints import (
    Endpoints,
    ModelEndpoints,
    process_start_ticks,
    write_endpoints,
)
from sod_mcore.trajectory import Prompt
from tests.end_to_end.programs import TEACHER

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "2+3"}}</tool_call>'
HELD_SECONDS = 300.0
"""How long a request is held at most, so that a test that fails ends."""


class InputEngine:
    """Answers by the ids; its attributes may be read from any thread.

    Attributes:
        requests: bodies of the requests for turns, without their names, in order of arrival.
        scored: the same of those for scores.
        aborted: names of the requests that it was told to end.
        holds: whether a turn after this text waits, until ``release`` or another answer.
        held: texts that had to wait.
    """

    def __init__(self, holds: Callable[[str], bool] = lambda text: False) -> None:
        self.requests: list[dict[str, Any]] = []
        self.scored: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.holds = holds
        self.held: list[str] = []
        self._names: list[str] = []
        self._is_released = threading.Event()
        self._renderer = ChatRenderer.from_folder(TEACHER)

    def release(self) -> None:
        """Answer what was held, and hold nothing any more."""
        self._is_released.set()

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_post("/generate", self._generate)
        application.router.add_post("/abort_request", self._abort)
        return application

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body.pop("rid")
        if body["sampling_params"]["max_new_tokens"] == 0:
            self.scored.append(body)
            return web.json_response(_scores(body))
        self.requests.append(body)
        text = self._renderer.tokenizer.decode(body["input_ids"])
        if self.holds(text) and not self._is_released.is_set():
            self.held.append(text)
            await self._wait_for_release(name, text)
        return web.json_response(self._turn(body["input_ids"]))

    async def _wait_for_release(self, name: str, text: str) -> None:
        deadline = asyncio.get_running_loop().time() + HELD_SECONDS
        while self.holds(text) and not self._is_released.is_set() and name not in self.aborted:
            assert asyncio.get_running_loop().time() < deadline, "nobody released it"
            await asyncio.sleep(0.01)

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    def _turn(self, input_ids: list[int]) -> dict[str, Any]:
        code = zlib.crc32(str(input_ids).encode())
        text = CALL if code % 3 == 0 else rf"\boxed{{{code % 2 + 4}}}"
        ids = self._renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, self._renderer.end_of_turn_id]
        entries = [[-((code + place) % 7) / 8, token, None] for place, token in enumerate(ids)]
        meta = {
            "finish_reason": {"type": "stop"},
            "weight_version": "0",
            "output_token_logprobs": entries,
        }
        return {"output_ids": ids, "meta_info": meta}


def _scores(body: dict[str, Any]) -> dict[str, Any]:
    ids = body["input_ids"][body["logprob_start_len"] :]
    entries: list[list[Any]] = [[None, ids[0], None]]
    entries += [[-(token % 5) / 4, token, None] for token in ids[1:]]
    return {"meta_info": {"input_token_logprobs": entries}}


@contextmanager
def served(engine: InputEngine) -> Iterator[str]:
    """The engine's address, while a thread serves it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = TestServer(engine.application())
    asyncio.run_coroutine_threadsafe(server.start_server(), loop).result(30)
    try:
        yield str(server.make_url("")).rstrip("/")
    finally:
        engine.release()
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


def write_fleet(directory: Path, url: str) -> None:
    """Let pools find the engine, which is student and teacher, by the run's directory."""
    models = {
        name: ModelEndpoints(name, url, (url,), str(TEACHER), 2048, 1 << 20)
        for name in ("student", "teacher")
    }
    start = process_start_ticks(os.getpid())
    assert start is not None
    write_endpoints(Endpoints(url, models, os.getpid(), start, socket.gethostname()), directory)


def pool_settings(directory: Path, rollout: dict[str, Any]) -> PoolSettings:
    """A pool that plays sums against the engine of ``directory``."""
    return PoolSettings(
        run_directory=directory,
        serving_directory=directory,
        student_path=TEACHER,
        serving=ServingConfig(student=EngineConfig(model_path=str(TEACHER))),
        rollout=RolloutConfig(max_response_tokens=1000, max_turns=4, **rollout),
        tools=ToolsConfig(names=("calculator",)),
        reward=RewardConfig(verifiers={"sums": "math"}, workers=1),
        chat=ChatConfig(),
        teacher=TeacherConfig(),
        teacher_top_k=0,
        sources=("sums",),
    )


def sums(count: int, samples: int = 2, spare: int = 0, **changes: Any) -> RolloutRequest:
    """A greedy batch of ``count`` problems, all of which ask for 5, and ``spare`` more."""
    prompts = tuple(
        Prompt(({"role": "user", "content": f"{i}+{5 - i}="},), "5", "sums", f"p{i}")
        for i in range(count + spare)
    )
    return RolloutRequest(prompts, samples, Sampling(0.0, 1.0), spare_prompts=spare, **changes)
