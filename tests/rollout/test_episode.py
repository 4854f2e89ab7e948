"""The conversation loop, turn by turn, against a scripted model and tool."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from sod_mcore.chat import ChatRenderer
from sod_mcore.rollout.episode import TOOL_UNAVAILABLE, Episode, EpisodeLimits, Sampling
from sod_mcore.rollout.lanes import Lanes, Track
from sod_mcore.serving.client.messages import Generation, SamplingSettings
from sod_mcore.timeline import SpanRecorder
from sod_mcore.tools.interface import ToolResult
from sod_mcore.trajectory import Prompt, Trajectory

PROMPT = Prompt(({"role": "user", "content": "?"},), "4", "arithmetic", "p0")
CALL = '<tool_call>{"name": "code_interpreter", "arguments": {"code": "2+2"}}</tool_call>'
END = 0


class CharacterRenderer:
    """One token a character, so that tests can read the ids; END is the end of a turn."""

    def render_prompt(self, messages: Sequence[Any], tools: Any) -> np.ndarray:
        return encode("Q:")

    def observation_ids(self, text: str) -> np.ndarray:
        return encode(f"[{text}]")

    def turn_text(self, token_ids: np.ndarray) -> str:
        return "".join(chr(i) for i in token_ids if i != END)


class Calculator:
    """A tool that fails on everything but 2+2."""

    @property
    def schema(self) -> dict[str, object]:
        return {"function": {"name": "code_interpreter"}}

    async def call(self, arguments: Mapping[str, object]) -> ToolResult:
        return ToolResult("4", True) if arguments["code"] == "2+2" else ToolResult("no", False)


class ScriptedModel:
    """Returns the given turns one after the other and remembers what it was asked."""

    def __init__(self, *turns: str, finish_reason: str = "stop") -> None:
        self.turns = list(turns)
        self.finish_reason = finish_reason
        self.inputs: list[str] = []
        self.budgets: list[int] = []

    async def __call__(self, input_ids: np.ndarray, sampling: SamplingSettings) -> Generation:
        self.inputs.append("".join(chr(i) if i else "." for i in input_ids))
        self.budgets.append(sampling.max_new_tokens)
        token_ids = encode(self.turns.pop(0), END)
        n = len(token_ids)
        return Generation(
            token_ids,
            np.full(n, -1.0, np.float32),
            self.finish_reason,
            3,
            np.full(n, 3, np.int32),
        )


def encode(text: str, *more: int) -> np.ndarray:
    return np.array([*map(ord, text), *more], np.int32)


def play(
    model: ScriptedModel,
    tools_enabled: bool = True,
    recorder: SpanRecorder | None = None,
    **limits: Any,
) -> Trajectory:
    settings = {"max_turns": 4, "max_response_tokens": 1000, "max_turn_tokens": None} | limits
    settings.setdefault("malformed_call", "observe")
    episode = Episode(
        PROMPT,
        cast(ChatRenderer, CharacterRenderer()),
        {"code_interpreter": Calculator()},
        limits=EpisodeLimits(**settings),
        track=Track(recorder or SpanRecorder(), Lanes(), 5, "p0"),
        tools_enabled=tools_enabled,
    )
    return asyncio.run(episode.run(model, Sampling(1.0, 1.0)))


def test_each_turn_sees_the_exact_tokens_before_it() -> None:
    model = ScriptedModel(CALL, "four")
    trajectory = play(model)
    assert model.inputs == ["Q:", f"Q:{CALL}.[4]"]
    assert "".join(chr(i) if i else "." for i in trajectory.token_ids) == f"Q:{CALL}.[4]four."
    sampled = "".join(chr(i) if i else "." for i in trajectory.token_ids[trajectory.loss_mask])
    assert sampled == f"{CALL}.four."
    assert trajectory.end_reason == "answer"
    assert trajectory.tool_succeeded == (True,)
    assert [m["role"] for m in trajectory.messages] == ["user", "assistant", "tool", "assistant"]


def test_a_malformed_call_becomes_an_error_to_react_to() -> None:
    model = ScriptedModel("<tool_call>{oops</tool_call>", "four")
    trajectory = play(model)
    assert trajectory.tool_succeeded == (False,)
    assert "Error" in model.inputs[1]
    assert trajectory.end_reason == "answer"


def test_a_malformed_call_can_end_the_trajectory() -> None:
    trajectory = play(ScriptedModel("<tool_call>{oops</tool_call>"), malformed_call="end")
    assert trajectory.end_reason == "malformed_call"
    assert trajectory.num_turns == 1


def test_a_failing_program_is_an_observation() -> None:
    trajectory = play(ScriptedModel(CALL.replace("2+2", "2+"), CALL, "four"))
    assert trajectory.tool_succeeded == (False, True)


def test_an_unknown_tool_is_an_observation_that_names_the_tools() -> None:
    model = ScriptedModel(CALL.replace("code_interpreter", "browser"), "four")
    play(model)
    assert "no tool named 'browser'; there is: code_interpreter" in model.inputs[1]


def test_the_last_turn_calls_no_tool() -> None:
    trajectory = play(ScriptedModel(CALL, CALL), max_turns=2)
    assert trajectory.end_reason == "max_turns"
    assert trajectory.tool_succeeded == (True,)
    assert trajectory.loss_mask[-1]


def test_an_observation_that_would_overflow_ends_the_trajectory() -> None:
    budget = len(CALL) + 1 + len("[4]")
    trajectory = play(ScriptedModel(CALL), max_response_tokens=budget)
    assert trajectory.end_reason == "length"
    assert trajectory.loss_mask[-1], "no trajectory ends on an observation"


def test_the_budget_of_a_turn_counts_observations() -> None:
    model = ScriptedModel(CALL, "four")
    play(model, max_response_tokens=200)
    assert model.budgets == [200, 200 - len(CALL) - 1 - len("[4]")]
    model = ScriptedModel("four")
    play(model, max_turn_tokens=7)
    assert model.budgets == [7]


def test_a_turn_cut_by_the_limit_ends_the_trajectory() -> None:
    assert play(ScriptedModel(CALL, finish_reason="length")).end_reason == "length"


def test_a_disabled_tool_says_so() -> None:
    model = ScriptedModel(CALL, "four")
    trajectory = play(model, tools_enabled=False)
    assert TOOL_UNAVAILABLE in model.inputs[1]
    assert trajectory.tool_succeeded == (False,)


def test_each_executed_call_is_a_span_under_the_tools_name() -> None:
    recorder = SpanRecorder()
    unknown = CALL.replace("code_interpreter", "browser")
    play(ScriptedModel(CALL, unknown, CALL, "four"), recorder=recorder)
    spans = [(span.kind, span.lane, span.label) for span in recorder.take()]
    assert spans == [("tool", 5, "code_interpreter")] * 2
