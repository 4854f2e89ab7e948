"""Rewards a finished trajectory: chooses the verifier, scales its verdict and shapes the reward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from sod_mcore.config import ConfigError, RewardConfig, ToolsConfig
from sod_mcore.rewards import (
    GraderPool,
    PooledVerifier,
    RewardResult,
    RewardScale,
    SourceTable,
    Verifier,
    VerifierRegistry,
    check_row,
    find_grader,
    shape,
)
from sod_mcore.rewards.code import CodeVerifier
from sod_mcore.rewards.registry import CODE
from sod_mcore.tools import (
    MemoryGroup,
    Sandbox,
    SandboxFusionClient,
    SandboxLimits,
    make_runner,
)
from sod_mcore.trajectory import Prompt, Trajectory

MEBIBYTE = 1 << 20
CODE_OUTPUT_BYTES = 16 * MEBIBYTE
"""Room for tests that expect megabytes of output."""


@dataclass(frozen=True)
class Judge:
    """Rewards trajectories.

    Attributes:
        max_response_tokens: the limit that the overlong penalty counts from.
    """

    verifiers: VerifierRegistry
    config: RewardConfig
    max_response_tokens: int

    async def __call__(self, prompt: Prompt, trajectory: Trajectory) -> RewardResult:
        """The reward of a trajectory; only its final turn is read.

        Raises:
            ValueError: the data row is unusable.
            InfrastructureError: what the verifier runs on is broken.
        """
        verdict = await self.verifiers.for_source(prompt.data_source).verify(
            str(trajectory.messages[-1]["content"]), prompt.ground_truth, prompt.extra_info
        )
        result = RewardScale(self.config.correct, self.config.wrong).result(verdict)
        return shape(
            result,
            self.config,
            tool_calls=len(trajectory.tool_succeeded),
            response_tokens=len(trajectory) - trajectory.prompt_length,
            max_response_tokens=self.max_response_tokens,
        )


async def open_judge(
    config: RewardConfig,
    tools: ToolsConfig,
    sources: Sequence[str],
    max_response_tokens: int,
    stack: AsyncExitStack,
    memory_group: MemoryGroup | None = None,
) -> Judge:
    """Start what the verifiers of ``sources`` run on; ``stack`` closes it.

    Args:
        sources: the ``data_source`` of all rows that may come.

    Raises:
        ConfigError: a verifier cannot be found.
        ValueError: a source has none.
        InfrastructureError: the sandbox or the grading processes cannot be started.
    """
    names = verifier_names(config, sources)
    verifiers: dict[str, Verifier] = {}
    if CODE in names:
        runner = _make_code_runner(config, tools, memory_group)
        await stack.enter_async_context(runner)
        verifiers[CODE] = CodeVerifier(runner, config.code)
    graders = {name: find_grader(name, math=config.math) for name in names - {CODE}}
    if graders:
        pool = await stack.enter_async_context(
            GraderPool(workers=config.workers, timeout_seconds=config.timeout_seconds)
        )
        verifiers |= {name: PooledVerifier(grader, pool) for name, grader in graders.items()}
    registry = VerifierRegistry(SourceTable(config.verifiers), verifiers)
    return Judge(registry, config, max_response_tokens)


def verifier_names(config: RewardConfig, sources: Sequence[str]) -> frozenset[str]:
    """Names of the verifiers that these sources need.

    Raises:
        ValueError: a source has none; the message lists the known prefixes.
    """
    table = SourceTable(config.verifiers)
    return frozenset(table.name_for(source) for source in sources)


def check_verifiers(config: RewardConfig, prompts: Iterable[Prompt]) -> None:
    """Find what is wrong with verifiers and their rows, without starting anything.

    Raises:
        ConfigError: a source has no verifier, one cannot be found, or a row is unusable to its own.
    """
    table = SourceTable(config.verifiers)
    found: set[str] = set()
    for prompt in prompts:
        try:
            name = table.name_for(prompt.data_source)
            if name not in found | {CODE}:
                find_grader(name, math=config.math)
                found.add(name)
            check_row(name, prompt.ground_truth, prompt.extra_info, math=config.math)
        except ValueError as error:
            raise ConfigError(f"{prompt.prompt_id}: {error}") from error


def _make_code_runner(
    config: RewardConfig, tools: ToolsConfig, memory_group: MemoryGroup | None
) -> Sandbox | SandboxFusionClient:
    limits = SandboxLimits(
        wall_seconds=config.code_wall_seconds,
        cpu_seconds=max(1, round(config.code_wall_seconds)),
        memory_bytes=config.code_memory_mb * MEBIBYTE,
        processes=max(2, tools.processes),  # a judge and the program that it calls
        output_bytes=CODE_OUTPUT_BYTES,
    )
    return make_runner(
        tools, limits, max_concurrency=config.code_workers, memory_group=memory_group
    )
