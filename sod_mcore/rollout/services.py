"""Wires the engines, the tools and the verifiers to the batch loop, inside the pool process."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sod_mcore.chat import ChatRenderer
from sod_mcore.config import RewardConfig, RolloutConfig, ToolsConfig
from sod_mcore.rewards import ReasoningGymVerifier, RewardResult, VerifierRegistry
from sod_mcore.rollout.batch import BatchServices, RolloutRequest
from sod_mcore.rollout.episode import Episode, EpisodeLimits
from sod_mcore.rollout.gate import RequestGate
from sod_mcore.rollout.pool import PoolSettings
from sod_mcore.serving.client import EngineClient, Generation, SamplingSettings
from sod_mcore.serving.fleet import read_endpoints
from sod_mcore.serving.scoring import ScoringError, score
from sod_mcore.tools.code_interpreter import CodeInterpreter, ToolOutputRule
from sod_mcore.tools.interface import Tool
from sod_mcore.tools.limits import SandboxLimits
from sod_mcore.tools.sandbox import Sandbox
from sod_mcore.trajectory import Prompt, Trajectory

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class RolloutServices:
    """What the pool process works with."""

    batch_services: BatchServices
    gate: RequestGate

    async def set_gate(self, is_open: bool) -> None:
        """Let requests through to the engines, or hold them back."""
        await self.gate.set_open(is_open)


async def open_services(settings: PoolSettings, stack: AsyncExitStack) -> RolloutServices:
    """Connect to the engines and start the sandbox; ``stack`` closes both."""
    endpoints = read_endpoints(settings.serving_directory)
    client = await stack.enter_async_context(
        EngineClient(
            endpoints,
            request_timeout_seconds=settings.serving.request_timeout_seconds,
            max_connections=settings.serving.max_connections,
        )
    )
    renderer = ChatRenderer.from_folder(
        settings.student_path, enable_thinking=settings.chat.enable_thinking
    )
    tools = await _open_tools(settings.tools, stack)
    verifiers = make_verifiers(settings.reward)
    gate = RequestGate()
    limits = _episode_limits(settings.rollout)

    async def generate(input_ids: NDArray[np.int32], sampling: SamplingSettings) -> Generation:
        async with gate.request():
            return await client.generate("student", input_ids, sampling, rid=uuid.uuid4().hex)

    async def run_episode(prompt: Prompt, request: RolloutRequest) -> Trajectory:
        episode = Episode(
            prompt, renderer, tools, limits=limits, tools_enabled=request.tools_enabled
        )
        return await episode.run(generate, request.sampling)

    async def reward(prompt: Prompt, trajectory: Trajectory) -> RewardResult:
        verifier = verifiers.for_source(prompt.data_source)
        answer = str(trajectory.messages[-1]["content"])
        return await asyncio.to_thread(
            verifier.score, answer, prompt.ground_truth, prompt.extra_info
        )

    async def score_with_teacher(trajectory: Trajectory) -> Trajectory:
        async with gate.request():
            scores = await score(
                client,
                "teacher",
                trajectory.token_ids,
                trajectory.prompt_length,
                top_k=settings.teacher_top_k,
            )
        return trajectory.with_teacher(scores.logprobs, scores.topk_ids, scores.topk_logprobs)

    return RolloutServices(
        BatchServices(run_episode, reward, score_with_teacher, ScoringError), gate
    )


def make_verifiers(config: RewardConfig) -> VerifierRegistry:
    """The verifiers that there are, by prefix of ``data_source``."""
    reasoning_gym = ReasoningGymVerifier(correct_reward=config.correct, wrong_reward=config.wrong)
    return VerifierRegistry({"reasoning_gym": reasoning_gym})


async def _open_tools(config: ToolsConfig, stack: AsyncExitStack) -> dict[str, Tool]:
    limits = SandboxLimits(
        wall_seconds=config.wall_seconds,
        cpu_seconds=config.cpu_seconds,
        memory_bytes=config.memory_mb * MEBIBYTE,
        processes=config.processes,
    )
    sandbox = Sandbox(
        limits,
        max_concurrency=config.workers,
        allow_unisolated=config.run_code_without_isolation,
    )
    await sandbox.start()
    stack.push_async_callback(sandbox.close)
    rule = ToolOutputRule(config.max_output_characters, config.truncation, config.traceback)
    interpreter = CodeInterpreter(sandbox, rule)
    return {"code_interpreter": interpreter}


def _episode_limits(config: RolloutConfig) -> EpisodeLimits:
    return EpisodeLimits(
        max_turns=config.max_turns,
        max_response_tokens=config.max_response_tokens,
        max_turn_tokens=config.max_turn_tokens,
        malformed_call=config.malformed_call,
    )
