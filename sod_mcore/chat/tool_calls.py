"""Finds the tool calls in a sampled turn (hermes format, as Qwen models write them).

A call that cannot be read is no final answer: the model is told what is wrong with it, in words
that say how to mend it, and goes on.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_LEADING_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_EXPECTED = 'expected {"name": "<tool>", "arguments": {...}}'


@dataclass(frozen=True)
class ToolCall:
    """One call as the model wrote it; whether tool and arguments exist is for ``tools/`` to say."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ParsedTurn:
    """What a turn asks for.

    Attributes:
        calls: the readable calls, in order. No calls and no ``malformed`` is a final answer.
        malformed: what is wrong with the first unreadable call, as text for the model; else None.
    """

    calls: tuple[ToolCall, ...]
    malformed: str | None


class _MalformedCall(ValueError):
    """The text after an opening marker is not a call."""


def parse_tool_calls(text: str) -> ParsedTurn:
    """The tool calls of a turn's text. A leading ``<think>`` block is not searched."""
    thought = _LEADING_THOUGHT.match(text)
    rest = text[thought.end() if thought else 0 :]
    calls: list[ToolCall] = []
    problems: list[str] = []
    if _CLOSE in rest and _OPEN not in rest:
        problems.append(f"{_CLOSE} without {_OPEN}")
    while _OPEN in rest:
        body = rest[rest.index(_OPEN) + len(_OPEN) :].lstrip()
        try:
            call, rest = _parse_call(body)
            calls.append(call)
        except _MalformedCall as problem:
            problems.append(str(problem))
            rest = body.partition(_CLOSE)[2]
    malformed = f"Error: malformed tool call: {problems[0]}" if problems else None
    return ParsedTurn(tuple(calls), malformed)


def _parse_call(body: str) -> tuple[ToolCall, str]:
    """The call at the start of ``body`` and the text after its closing marker.

    The JSON is read before the closing marker is looked for, so that a program may contain one.
    """
    if _CLOSE not in body:
        raise _MalformedCall(f"{_OPEN} is not closed by {_CLOSE}")
    value, end = _decode(body)
    rest = body[end:].lstrip()
    if not rest.startswith(_CLOSE):
        raise _MalformedCall(f"text after the JSON object: {rest.partition(_CLOSE)[0][:40]!r}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise _MalformedCall(f'no "name"; {_EXPECTED}')
    if not isinstance(value.get("arguments"), dict):
        raise _MalformedCall(f'"arguments" is not a JSON object; {_EXPECTED}')
    return ToolCall(value["name"], value["arguments"]), rest[len(_CLOSE) :]


def _decode(body: str) -> tuple[Any, int]:
    try:
        value, end = json.JSONDecoder().raw_decode(body)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        hint = (
            "; write line breaks inside strings as \\n" if "control character" in error.msg else ""
        )
        place = f"line {error.lineno} column {error.colno}"
        raise _MalformedCall(f"invalid JSON ({error.msg}, {place}){hint}") from error
    except UnicodeEncodeError as error:
        raise _MalformedCall("invalid JSON (half a surrogate pair)") from error
    except ValueError as error:
        raise _MalformedCall("invalid JSON (a number with too many digits)") from error
    except RecursionError as error:
        raise _MalformedCall("invalid JSON (nested too deeply)") from error
    return value, end
