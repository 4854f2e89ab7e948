"""Wires the engines, the tools and the verifiers to the batch loop, inside the pool process."""

from __future__ import annotations

import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sod_mcore.chat import ChatRenderer
from sod_mcore.config import RolloutConfig, ToolsConfig
from sod_mcore.rollout.episode import Episode, EpisodeLimits, tool_schemas
from sod_mcore.rollout.gate import RequestGate
from sod_mcore.rollout.group import BatchServices
from sod_mcore.rollout.judge import open_judge
from sod_mcore.rollout.lanes import Track
from sod_mcore.rollout.pool import PoolSettings
from sod_mcore.rollout.request import RolloutRequest
from sod_mcore.rollout.teacher import TeacherScorer
from sod_mcore.serving.client.counters import ClientCounters
from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.messages import Generation, SamplingSettings
from sod_mcore.serving.client.replicas import Affinity
from sod_mcore.serving.client.scoring import ScoringError
from sod_mcore.serving.endpoints import engines_now, read_endpoints
from sod_mcore.tools import (
    MemoryGroup,
    Tool,
    make_runner,
    make_tools,
    open_memory_group,
    tool_limits,
)
from sod_mcore.trajectory import Prompt, Trajectory


@dataclass(frozen=True)
class RolloutServices:
    """What the pool process works with.

    Attributes:
        models_with_weights: models that the trainer sends weights to.
    """

    batch_services: BatchServices
    gate: RequestGate
    client: EngineClient
    models_with_weights: tuple[str, ...]

    def require_weights(self, version: int) -> None:
        """Use the engines that get the trainer's weights only once they have this version."""
        for model in self.models_with_weights:
            self.client.require_version(model, version)

    def counters(self) -> dict[str, ClientCounters]:
        """What happened to all requests to the engines so far, by model."""
        return {model: self.client.counters(model) for model in self.client.endpoints.models}

    async def set_gate(self, is_open: bool) -> None:
        """Let requests through to the engines, or hold them back."""
        await self.gate.set_open(is_open)


async def open_services(settings: PoolSettings, stack: AsyncExitStack) -> RolloutServices:
    """Connect to the engines and start the sandbox; ``stack`` closes both."""
    endpoints = read_endpoints(settings.serving_directory)
    gate = RequestGate()
    client = await stack.enter_async_context(
        EngineClient(
            endpoints,
            request_timeout_seconds=settings.serving.request_timeout_seconds,
            restart_timeout_seconds=settings.serving.restart_timeout_seconds,
            hedge_after_seconds=settings.serving.hedge_after_seconds,
            max_connections=settings.serving.max_connections,
            admission=gate.request,
            find_engines=partial(engines_now, settings.serving_directory),
        )
    )
    renderer = ChatRenderer.from_folder(
        settings.student_path, enable_thinking=settings.chat.enable_thinking
    )
    memory_group = stack.enter_context(open_memory_group(settings.tools))
    tools = await _open_tools(settings.tools, memory_group, stack)
    judge = await open_judge(
        settings.reward,
        settings.tools,
        settings.sources,
        settings.rollout.max_response_tokens,
        stack,
        memory_group,
    )
    limits = _episode_limits(settings.rollout)

    async def run_episode(prompt: Prompt, request: RolloutRequest, track: Track) -> Trajectory:
        affinity = Affinity(key=uuid.uuid4().hex, group=prompt.prompt_id)

        async def generate(input_ids: NDArray[np.int32], sampling: SamplingSettings) -> Generation:
            return await client.generate(
                "student",
                input_ids,
                sampling,
                rid=uuid.uuid4().hex,
                affinity=affinity,
                in_flight=track.span("generate"),
            )

        episode = Episode(
            prompt, renderer, tools, limits=limits, track=track, tools_enabled=request.tools_enabled
        )
        try:
            return await episode.run(generate, request.sampling)
        finally:
            client.forget("student", affinity.key)

    scorer = TeacherScorer(
        settings.teacher, client, renderer, tool_schemas(tools.values()), settings.teacher_top_k
    )

    async def score_with_teacher(
        prompt: Prompt, trajectory: Trajectory, track: Track
    ) -> Trajectory:
        return await scorer(prompt, trajectory, in_flight=track.span("scoring"))

    averaged = ("teacher",) if settings.teacher.weights == "average" else ()
    return RolloutServices(
        BatchServices(run_episode, judge, score_with_teacher, ScoringError),
        gate,
        client,
        models_with_weights=("student", *averaged),
    )


async def _open_tools(
    config: ToolsConfig, memory_group: MemoryGroup | None, stack: AsyncExitStack
) -> dict[str, Tool]:
    runner = make_runner(
        config, tool_limits(config), max_concurrency=config.workers, memory_group=memory_group
    )
    if config.names:
        await stack.enter_async_context(runner)
    return make_tools(config, runner)


def _episode_limits(config: RolloutConfig) -> EpisodeLimits:
    return EpisodeLimits(
        max_turns=config.max_turns,
        max_response_tokens=config.max_response_tokens,
        max_turn_tokens=config.max_turn_tokens,
        malformed_call=config.malformed_call,
    )
