"""Reads the ground truths of programming problems: unit tests, as JSON text.

Three forms are published: cases ``{inputs, outputs[, fn_name]}``, LeetCode's ``{entry_point,
import_prefix, test_code}``, and HumanEval's ``{prompt, test, entry_point}``. Which of them a row
has shows in its own keys.
"""

from __future__ import annotations

import ast
import json
from typing import Any

from sod_mcore.data.errors import FieldError, shortened
from sod_mcore.data.fields import Row

_FORMS = (
    ("inputs", "outputs"),
    ("entry_point", "import_prefix", "test_code"),
    ("prompt", "test", "entry_point"),
)


def program_tests(value: Any, field: str) -> tuple[Row, str]:
    """The unit tests in ``value``, and the JSON text that a verifier reads.

    Args:
        value: a struct, its JSON text, or its text as a Python literal (the reference reads both);
            such text may have been written as JSON text once more.
        field: what to call ``value`` in an error.

    Raises:
        FieldError: it is none of the three forms, or inputs and outputs do not pair up.
    """
    tests, text = _read(value, field)
    if not any(all(tests.get(key) is not None for key in form) for form in _FORMS):
        forms = " or ".join("{" + ", ".join(form) + "}" for form in _FORMS)
        raise FieldError(field, f"has the keys {sorted(tests)}; {forms} is needed")
    if "inputs" in tests:
        _check_cases(tests, field)
    return tests, text


def _read(value: Any, field: str) -> tuple[Row, str]:
    if isinstance(value, dict):
        # A struct of a Parquet file has all keys of all rows.
        tests = {key: item for key, item in value.items() if item is not None}
        return tests, json.dumps(tests, ensure_ascii=False)
    if not isinstance(value, str):
        raise FieldError(field, f"is {shortened(value)}; unit tests as JSON text are needed")
    tests, text = _parsed(value, field)
    if isinstance(tests, str):
        tests, text = _parsed(tests, field)
    if not isinstance(tests, dict):
        raise FieldError(field, f"is {shortened(tests)}; an object of unit tests is needed")
    return tests, text


def _parsed(text: str, field: str) -> tuple[Any, str]:
    """What a text says, and JSON text that says the same."""
    try:
        return json.loads(text), text
    except (ValueError, RecursionError) as error:
        value = _literal(text, field, error)
        return value, json.dumps(value, ensure_ascii=False)


def _literal(text: str, field: str, json_error: Exception) -> Any:
    try:
        value = ast.literal_eval(text)
        json.dumps(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        problem = f"is {shortened(text)}; unit tests as JSON text are needed ({json_error})"
        raise FieldError(field, problem) from error
    return value


def _check_cases(tests: Row, field: str) -> None:
    inputs, outputs = tests["inputs"], tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        problem = f"are {shortened(inputs)} and {shortened(outputs)}; two lists are needed"
        raise FieldError(f"{field}.inputs and .outputs", problem)
    if not inputs or len(inputs) != len(outputs):
        problem = f"have {len(inputs)} and {len(outputs)} cases; as many of both, 1 at least"
        raise FieldError(f"{field}.inputs and .outputs", problem)
    if not isinstance(tests.get("fn_name", ""), str | None):
        raise FieldError(f"{field}.fn_name", f"is {shortened(tests['fn_name'])}; text is needed")
