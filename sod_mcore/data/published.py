"""The published data sets: recognises the schema of a row by the row itself, and reads it.

Beside the schema of reinforcement-learning files there are those of the evaluation sets, of which
some have no data_source. A row that has one keeps it, whatever its schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sod_mcore.data.errors import FieldError, shortened
from sod_mcore.data.fields import (
    Row,
    answer_field,
    json_field,
    mapping_field,
    messages_field,
    question_field,
    text_field,
)
from sod_mcore.data.instructions import Question
from sod_mcore.data.program_tests import program_tests
from sod_mcore.trajectory import Message

_PROGRAM_SOURCES = ("train-code-", "LiveCodeBench_v6", "humaneval", "HumanEval")
_OPTION = re.compile(r"\s*(?:\\boxed\{)?\s*([A-J])\s*\}?\s*")


@dataclass(frozen=True)
class Problem:
    """A row as its schema says it, before instructions.

    Attributes:
        question: what the last user message asks.
        ground_truth: as the verifier reads it.
        data_source: the row's own, or that of its schema.
        messages: the conversation, of which ``question`` is the last user message; empty where it
            is all of it.
        extra_info: further fields for the verifier.
    """

    question: Question
    ground_truth: str
    data_source: str
    messages: tuple[Message, ...] = ()
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Schema:
    """Columns that tell a row, and how it is read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Problem]


def schema_of(row: Row) -> Schema:
    """The schema all of whose columns ``row`` fills; else the one that it fills most of.

    Raises:
        FieldError: the row has none of the columns of any schema.
    """
    filled = {name for name, value in row.items() if value is not None}
    for schema in SCHEMAS:
        if filled.issuperset(schema.columns):
            return schema
    nearest = max(SCHEMAS, key=lambda schema: len(filled.intersection(schema.columns)))
    if not filled.intersection(nearest.columns):
        known = "; ".join(f"{schema.name}: {', '.join(schema.columns)}" for schema in SCHEMAS)
        hint = ", this is a conversation for SFT" if "messages" in filled else ""
        raise FieldError("columns", f"are {sorted(row)}{hint}; known schemas are {known}")
    return nearest


def _read_rl(row: Row) -> Problem:
    source = text_field(row, "data_source")
    messages = messages_field(row, "prompt")
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not asked:
        raise FieldError("prompt", "has no message of the user; one is needed")
    truth = mapping_field(row, "reward_model").get("ground_truth")
    extra_info = json_field(row, "extra_info")
    domain = str(extra_info.get("domain") or "")
    if source.startswith(_PROGRAM_SOURCES):
        tests, text = program_tests(truth, "reward_model.ground_truth")
        question = _question_with_tests(asked[-1], tests)
    else:
        text, question = _ground_truth(truth), Question(asked[-1], domain)
    return Problem(question, text, source, tuple(messages), extra_info)


def _read_human_eval(row: Row) -> Problem:
    tests = {name: text_field(row, name) for name in ("prompt", "test", "entry_point")}
    question = Question(question_field(row, "prompt"))
    extra_info = {"task_id": text_field(row, "task_id")}
    truth = json.dumps(tests, ensure_ascii=False)
    return Problem(question, truth, _source(row, "humaneval"), (), extra_info)


def _read_live_code_bench(row: Row) -> Problem:
    reward_model = mapping_field(row, "reward_model")
    name = "reward_model.ground_truth" if "ground_truth" in reward_model else "reward_model"
    truth = reward_model.get("ground_truth", reward_model)
    tests, text = program_tests(truth, name)
    question = _question_with_tests(question_field(row, "problem"), tests)
    extra_info = json_field(row, "extra_info")
    return Problem(question, text, _source(row, "LiveCodeBench_v6"), (), extra_info)


def _read_gpqa(row: Row) -> Problem:
    solution = text_field(row, "solution")
    letter = _OPTION.fullmatch(solution)
    if letter is None:
        problem = f"is {shortened(solution)}; the capital letter of an option, A to J, is needed"
        raise FieldError("solution", problem)
    domain = text_field(row, "domain")
    question = Question(question_field(row, "problem"), domain)
    return Problem(question, letter[1], _source(row, "gpqa_diamond"), (), {"domain": domain})


def _read_aime_2025(row: Row) -> Problem:
    question = Question(question_field(row, "problem"))
    return Problem(question, answer_field(row, "answer"), _source(row, "AIME2025"))


def _read_aime_2024(row: Row) -> Problem:
    question = Question(question_field(row, "Problem"))
    return Problem(question, answer_field(row, "Answer"), _source(row, "AIME2024"))


def _source(row: Row, default: str) -> str:
    return default if row.get("data_source") is None else text_field(row, "data_source")


def _question_with_tests(text: str, tests: Row) -> Question:
    cases = zip(tests.get("inputs", ()), tests.get("outputs", ()), strict=True)
    examples = tuple((_printed(given), _printed(wanted)) for given, wanted in cases)
    return Question(text, function_name=tests.get("fn_name") or "", examples=examples)


def _printed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _ground_truth(value: Any) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise FieldError("reward_model.ground_truth", f"is {value!r}; write the answer as text")
    return value


SCHEMAS = (
    Schema("rl", ("data_source", "prompt", "reward_model"), _read_rl),
    Schema("humaneval", ("prompt", "test", "entry_point"), _read_human_eval),
    Schema("livecodebench", ("problem", "reward_model"), _read_live_code_bench),
    Schema("gpqa", ("problem", "solution", "domain"), _read_gpqa),
    Schema("aime2025", ("problem", "answer"), _read_aime_2025),
    Schema("aime2024", ("Problem", "Answer"), _read_aime_2024),
)
