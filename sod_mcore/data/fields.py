"""Takes typed fields out of a row, and says what is wrong with one that has another type."""

from __future__ import annotations

import json
import math
from typing import Any

from sod_mcore.data.errors import FieldError, shortened

Row = dict[str, Any]


def text_field(row: Row, name: str) -> str:
    """A field that must hold text."""
    value = row.get(name)
    if not isinstance(value, str):
        raise FieldError(name, f"is {shortened(value)}; text is needed")
    return value


def question_field(row: Row, name: str) -> str:
    """A field that must hold what is asked: text that is not blank."""
    text = text_field(row, name)
    if not text.strip():
        raise FieldError(name, f"is {shortened(text)}; write the question, or remove the row")
    return text


def answer_field(row: Row, name: str) -> str:
    """A field that must hold a short answer, as text or as a number; ``204.0`` becomes 204."""
    value = row.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise FieldError(name, f"is {shortened(value)}; text or a number is needed")
    if isinstance(value, float) and not math.isfinite(value):
        problem = f"is {value}, which no answer can equal; write the number, or remove the row"
        raise FieldError(name, problem)
    return str(value)


def mapping_field(row: Row, name: str, default: Row | None = None) -> Row:
    """A field that must hold a struct, or JSON text of an object."""
    value = decoded(name, row.get(name))
    if value is None and default is not None:
        return default
    if not isinstance(value, dict):
        raise FieldError(name, f"is {shortened(value)}; a struct (or JSON text of one) is needed")
    return value


def json_field(row: Row, name: str) -> Row:
    """As :func:`mapping_field`, for what must survive as JSON; absent is empty."""
    value = mapping_field(row, name, default={})
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise FieldError(name, f"is {shortened(value)}; JSON cannot hold it ({error})") from error
    return value


def list_field(row: Row, name: str) -> list[Row]:
    """A field that must hold a list of structs, or JSON text of one; absent is empty."""
    value = decoded(name, row.get(name))
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise FieldError(name, f"is {shortened(value)}; a list of structs is needed")
    return [_without_nulls(item) for item in value]


def messages_field(row: Row, name: str) -> list[Row]:
    """A field that must hold chat messages, at least one; a missing content becomes empty,
    except that of a user, who must say something."""
    messages = list_field(row, name)
    if not messages:
        raise FieldError(name, "is empty; a list of {role, content} is needed")
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            problem = f"is {shortened(message.get('role'))}; text is needed"
            raise FieldError(f"{name}[{number}].role", problem)
        if not isinstance(message.setdefault("content", ""), str):
            problem = f"is {shortened(message['content'])}; text is needed"
            raise FieldError(f"{name}[{number}].content", problem)
        if message["role"] == "user" and not message["content"].strip():
            problem = "is empty; write what the user asks, or remove the row"
            raise FieldError(f"{name}[{number}].content", problem)
    return messages


def decoded(name: str, value: Any) -> Any:
    """``value``, or what it says where it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        problem = f"is {shortened(value)}; a struct, or JSON text of one, is needed ({error})"
        raise FieldError(name, problem) from error


def _without_nulls(value: Any) -> Any:
    """Parquet fills the fields that a struct lacks with nulls; chat templates must not see them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
