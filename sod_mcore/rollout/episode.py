"""One multi-turn conversation: generate, call the tool, show its output, until an answer.

The loop is that of the SOD paper's rollout, token-in and token-out, with two differences that are
settings: a malformed tool call gives the model an error to react to, and the observation block
begins with the newline that the chat template puts after the end-of-turn token, so that the tokens
are those of a one-shot rendering.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sod_mcore.chat import ChatRenderer, ParsedTurn, parse_tool_calls
from sod_mcore.rollout.lanes import Track
from sod_mcore.rollout.token_recorder import TokenRecorder
from sod_mcore.serving.client.messages import Generation, SamplingSettings
from sod_mcore.tools.interface import Tool, ToolResult
from sod_mcore.trajectory import Message, Prompt, Trajectory


class Generator(Protocol):
    """Samples one turn; the serving client with its model and gate bound."""

    async def __call__(
        self, input_ids: NDArray[np.int32], sampling: SamplingSettings
    ) -> Generation: ...


@dataclass(frozen=True)
class EpisodeLimits:
    """When a conversation ends.

    Attributes:
        max_turns: assistant turns, the answer included.
        max_response_tokens: tokens after the prompt, observations included.
        max_turn_tokens: sampled tokens in one turn; None leaves only the response budget.
        malformed_call: show an error to the model, or end the trajectory.
    """

    max_turns: int
    max_response_tokens: int
    max_turn_tokens: int | None
    malformed_call: Literal["observe", "end"]


@dataclass(frozen=True)
class Sampling:
    """Temperature (0 is greedy) and nucleus of a whole batch."""

    temperature: float
    top_p: float


TOOL_UNAVAILABLE = "Error: the tool is unavailable."


class Episode:
    """The state and the loop of one conversation."""

    def __init__(
        self,
        prompt: Prompt,
        renderer: ChatRenderer,
        tools: Mapping[str, Tool],
        *,
        limits: EpisodeLimits,
        track: Track,
        tools_enabled: bool = True,
    ) -> None:
        self._prompt = prompt
        self._renderer = renderer
        self._tools = tools
        self._limits = limits
        self._track = track
        self._tools_enabled = tools_enabled
        self._recorder = TokenRecorder(
            renderer.render_prompt(prompt.messages, tool_schemas(tools.values()))
        )
        self._messages: list[Message] = list(prompt.messages)
        self._tool_succeeded: list[bool] = []

    async def run(self, generate: Generator, sampling: Sampling) -> Trajectory:
        """Sample turns until the conversation ends; the trajectory has no reward or scores yet."""
        end_reason: str | None = None
        while end_reason is None:
            end_reason = await self._turn(generate, sampling)
        return self._recorder.to_trajectory(
            group_id=self._prompt.prompt_id,
            reward=0.0,
            is_correct=False,
            tool_succeeded=tuple(self._tool_succeeded),
            end_reason=end_reason,
            data_source=self._prompt.data_source,
            messages=tuple(self._messages),
        )

    async def _turn(self, generate: Generator, sampling: Sampling) -> str | None:
        """One assistant turn and its observation; returns why the trajectory ends, or None."""
        generation = await generate(self._recorder.token_ids, self._sampling_settings(sampling))
        self._recorder.append_turn(
            generation.token_ids,
            generation.logprobs,
            generation.weight_versions,
        )
        text = self._renderer.turn_text(generation.token_ids)
        self._messages.append({"role": "assistant", "content": text})
        if generation.finish_reason != "stop":
            return "length"
        turn = parse_tool_calls(text)
        if turn.malformed is None and not turn.calls:
            return "answer"
        if not turn.calls and self._limits.malformed_call == "end":
            return "malformed_call"
        if self._recorder.num_turns >= self._limits.max_turns:
            return "max_turns"
        result = await self._execute(turn)
        self._tool_succeeded.append(result.succeeded)
        return self._observe(result.text)

    async def _execute(self, turn: ParsedTurn) -> ToolResult:
        """Run the first call of the turn; like the reference, further calls are not executed."""
        if not turn.calls:
            return ToolResult(text=turn.malformed or "", succeeded=False)
        if not self._tools_enabled:
            return ToolResult(text=TOOL_UNAVAILABLE, succeeded=False)
        call = turn.calls[0]
        tool = self._tools.get(call.name)
        if tool is None:
            names = ", ".join(sorted(self._tools))
            return ToolResult(f"Error: no tool named '{call.name}'; there is: {names}", False)
        with self._track.span("tool", call.name):
            return await tool.call(call.arguments)

    def _observe(self, text: str) -> str | None:
        """Append the tool's output, unless it would overflow the response budget."""
        observation = self._renderer.observation_ids(text)
        if self._recorder.response_length + len(observation) >= self._limits.max_response_tokens:
            return "length"
        self._recorder.append_observation(observation)
        self._messages.append({"role": "tool", "content": text})
        return None

    def _sampling_settings(self, sampling: Sampling) -> SamplingSettings:
        budget = self._limits.max_response_tokens - self._recorder.response_length
        if self._limits.max_turn_tokens is not None:
            budget = min(budget, self._limits.max_turn_tokens)
        return SamplingSettings(
            max_new_tokens=budget, temperature=sampling.temperature, top_p=sampling.top_p
        )


def tool_schemas(tools: Iterable[Tool]) -> list[dict[str, object]]:
    """The function schemas that the chat template lists for the model."""
    return [tool.schema for tool in tools]
