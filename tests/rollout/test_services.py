"""How rollouts reach the engines: the turns of a trajectory, and the gate before them."""

from __future__ import annotations

import asyncio
import collections
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
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
from sod_mcore.rollout.lanes import open_track
from sod_mcore.rollout.pool import PoolSettings
from sod_mcore.rollout.request import RolloutRequest
from sod_mcore.rollout.services import RolloutServices, open_services
from sod_mcore.serving.endpoints import (
    Endpoints,
    ModelEndpoints,
    process_start_ticks,
    write_endpoints,
)
from sod_mcore.timeline import SpanRecorder
from sod_mcore.trajectory import Prompt, Trajectory
from tests.end_to_end.programs import TEACHER
from tests.serving.scripted_generation import PATIENCE, ScriptedEngine, answers, generated, until

RENDERER = ChatRenderer.from_folder(TEACHER)
CALL = '<tool_call>{"name": "none", "arguments": {}}</tool_call>'
REQUEST = RolloutRequest((), 1, Sampling(temperature=1.0, top_p=1.0))
TURNS = 3


async def call_a_tool(body: dict[str, Any]) -> web.Response:
    """Calls one in each turn but the last of a conversation."""
    is_last = text_of(body).count("no tool named") == TURNS - 1
    turn = {"role": "assistant", "content": "5" if is_last else CALL}
    ids = RENDERER.turn_ids([*prompt_of(0).messages, turn])
    meta = {"finish_reason": {"type": "stop"}, "weight_versions": None}
    return web.json_response(generated(ids.tolist(), **meta))


def text_of(body: dict[str, Any]) -> str:
    return RENDERER.turn_text(body["input_ids"])


def prompt_of(number: int) -> Prompt:
    message = {"role": "user", "content": f"Calculate {number} + 3."}
    return Prompt((message,), "5", "source", f"prompt {number}")


@asynccontextmanager
async def services_of(tmp_path: Path, *engines: ScriptedEngine) -> AsyncIterator[RolloutServices]:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(TestServer(e.application())) for e in engines]
        urls = tuple(str(server.make_url("")).rstrip("/") for server in servers)
        student = ModelEndpoints("student", "http://127.0.0.1:9", urls, str(TEACHER), 512, 10**6)
        pid = os.getpid()
        start = process_start_ticks(pid) or 0
        write_endpoints(
            Endpoints("http://127.0.0.1:9", {"student": student}, pid, start, socket.gethostname()),
            tmp_path,
        )
        settings = PoolSettings(
            run_directory=tmp_path,
            serving_directory=tmp_path,
            student_path=TEACHER,
            serving=ServingConfig(student=EngineConfig(model_path=str(TEACHER))),
            rollout=RolloutConfig(max_turns=TURNS, max_response_tokens=400),
            tools=ToolsConfig(names=()),
            reward=RewardConfig(),
            chat=ChatConfig(),
            teacher=TeacherConfig(),
            teacher_top_k=0,
            sources=(),
        )
        yield await open_services(settings, stack)


async def play(services: RolloutServices, number: int) -> Trajectory:
    prompt, own = prompt_of(number), services.batch_services
    with open_track(SpanRecorder(), own.lanes, prompt.prompt_id) as track:
        return await own.run_episode(prompt, REQUEST, track)


def test_the_turns_of_a_trajectory_go_to_one_engine(tmp_path: Path) -> None:
    async def run() -> None:
        engines = [ScriptedEngine(call_a_tool) for _ in range(3)]
        async with services_of(tmp_path, *engines) as services, asyncio.timeout(PATIENCE):
            trajectories = await asyncio.gather(*(play(services, n) for n in range(8)))
        assert {t.end_reason for t in trajectories} == {"answer"}
        served = [
            collections.Counter(text_of(body).partition("Calculate ")[2][0] for body in e.requests)
            for e in engines
        ]
        assert all(turns == TURNS for counter in served for turns in counter.values())
        assert sorted(len(counter) for counter in served) == [2, 3, 3]

    asyncio.run(run())


def test_a_closed_gate_does_not_wait_for_requests_without_an_engine(tmp_path: Path) -> None:
    """They may wait for the very weights that the gate was closed for."""

    async def run() -> None:
        engine = ScriptedEngine(answers(503))
        engine.is_healthy = False
        async with services_of(tmp_path, engine) as services, asyncio.timeout(PATIENCE):
            episode = asyncio.create_task(play(services, 1))
            await until(lambda: len(engine.checks) > 0)
            await services.set_gate(False)
            engine.handler, engine.is_healthy = call_a_tool, True
            await asyncio.sleep(1.0)
            assert len(engine.requests) == 1, "the gate is closed"
            await services.set_gate(True)
            assert (await episode).end_reason == "answer"

    asyncio.run(run())
