"""What a tool is, as seen by the rollout: a schema shown to the model and one asynchronous call.

The types separate two kinds of failure that must never be mixed. A program that crashes, prints too
much or runs too long has failed by itself: the model reads why and may mend it. A sandbox that
cannot run anything says nothing about the program: it raises `InfrastructureError`, the rollout
retries, and no trajectory learns from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

ToolSchema = dict[str, object]
"""A function schema in the form that chat templates render, `{"type": "function", ...}`."""


class InfrastructureError(Exception):
    """The sandbox or its host is broken. Never an observation, never a wrong answer."""


class SandboxUnavailableError(InfrastructureError):
    """This machine cannot isolate programs at all: retrying is of no use, the message says why."""


@dataclass(frozen=True)
class ToolResult:
    """The observation that the model reads. `succeeded` is False when the program failed."""

    text: str
    succeeded: bool


class Tool(Protocol):
    """Anything that a model can call."""

    @property
    def schema(self) -> ToolSchema:
        """The function schema as shown to the model."""
        ...

    async def call(self, arguments: Mapping[str, object]) -> ToolResult:
        """Run the tool. Wrong arguments give a failed `ToolResult`.

        Raises:
            InfrastructureError: the tool itself is broken; says nothing about the arguments.
        """
        ...


def function_schema(name: str, description: str, parameters: Mapping[str, str]) -> ToolSchema:
    """The schema of a function whose parameters are all required strings.

    Args:
        name: what the model writes to call the function.
        description: one sentence for the model.
        parameters: description of each parameter by its name.
    """
    properties = {
        parameter: {"type": "string", "description": text} for parameter, text in parameters.items()
    }
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(parameters),
            },
        },
    }
