"""Reads settings: YAML, then ``key=value`` overrides; what is wrong with them is one clear line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from sod_mcore.config import ConfigError

Section = TypeVar("Section")

_PYDANTIC_TAGS = frozenset({"[key]", "str", "tuple[str, ...]"})
"""Parts of an error's place that stand for a kind of value and not for a setting."""


def load_config(section: type[Section], path: Path, overrides: Sequence[str] = ()) -> Section:
    """Read ``section`` from a YAML file and apply ``key.sub=value`` overrides.

    A file may begin with ``extends: other.yaml``, or a list of such paths, relative to its own
    folder: each is laid over the ones before it, and the file's own settings over all of them.
    Mappings are joined key by key, so an empty one takes nothing away; null does.
    Override values are YAML (``true``, ``3``, ``[1, 2]``, ``null``).

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value is not allowed.
    """
    tree = _read_tree(path)
    for override in overrides:
        _apply_override(tree, override)
    try:
        return TypeAdapter(section).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_first_problem(section, error)) from error


def _read_tree(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a file, laid over those of the files that it extends."""
    if path.resolve() in extended_by:
        raise ConfigError(f"{path} extends itself; remove `extends` from one of the files")
    if not path.is_file():
        source = f", which {extended_by[-1]} extends" if extended_by else ""
        raise ConfigError(f"{path}{source}: no such file; give the path of a YAML configuration")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not {type(tree).__name__}")
    joined: dict[str, Any] = {}
    for base in _bases(path, tree.pop("extends", [])):
        joined = _laid_over(joined, _read_tree(base, (*extended_by, path.resolve())))
    return _laid_over(joined, tree)


def _bases(path: Path, extends: Any) -> list[Path]:
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{path}: extends is {extends!r}; it must be the path of a YAML file, or a list of them"
        )
    return [path.parent / name for name in names]


def _laid_over(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` over ``base``: sections are joined, values replaced."""
    joined = dict(base)
    for key, value in tree.items():
        below = joined.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _laid_over(below, value)
        joined[key] = value
    return joined


def fail(message: str) -> NoReturn:
    """Print one line to standard error and end the process with exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must look like key.sub=value")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = _one_line(error)
        raise ConfigError(f"override {override!r}: the value is not YAML: {reason}") from error


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())


def _first_problem(section: type, error: ValidationError) -> str:
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"] if str(part) not in _PYDANTIC_TAGS]
    field_name = ".".join(path)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        parent = path[:-1]
        allowed = ", ".join(sorted(_field_names(section, parent)))
        return f"{field_name} is not a setting; allowed here: {allowed}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{field_name} is missing; set it in the file or as {field_name}=VALUE"
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{field_name} is {problem['input']!r}: {reason}"


def _field_names(section: type, path: Sequence[str]) -> list[str]:
    schema = TypeAdapter(section).json_schema()
    node: dict[str, Any] = schema
    for key in path:
        section_node = _resolve(schema, node)
        named = section_node.get("additionalProperties") or {}
        node = section_node.get("properties", {}).get(key, named)
    return list(_resolve(schema, node).get("properties", {}))


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    for option in [node, *node.get("anyOf", []), *node.get("allOf", [])]:
        if "$ref" in option:
            resolved: dict[str, Any] = schema["$defs"][option["$ref"].split("/")[-1]]
            return resolved
    return node
