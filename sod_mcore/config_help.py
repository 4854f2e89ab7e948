"""The settings as text, from the types and docstrings in ``config/``: help and YAML reference.

python -m sod_mcore.config_help > docs/config_reference.yaml
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_origin

import yaml
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from sod_mcore.config import EvalConfig, SftConfig, SodConfig

WIDTH = 100
REQUIRED = "???"
"""Stands in the reference where a setting has no default."""

_REFERENCE_HEAD = """\
Every setting, with its type, its allowed values and its default; ??? marks what must be given.
Generated from sod_mcore/config/ by `make docs`: edit there, not here.
Any setting can be overridden on the command line: student.megatron.tensor_model_parallel_size=2
"""


@dataclass(frozen=True)
class Setting:
    """One line of the tree.

    Attributes:
        path: names from the root, ("optimizer", "lr").
        documentation: the docstring, without line breaks.
        kind: type and allowed values in words; for a section "" or "optional section".
        default: the value as YAML, or :data:`REQUIRED`.
        is_section: whether other settings lie under it.
    """

    path: tuple[str, ...]
    documentation: str
    kind: str
    default: str
    is_section: bool


def settings(section: type, path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """All settings under ``section``, each section before what lies in it, in source order."""
    schema = TypeAdapter(section).json_schema()
    fields: dict[str, FieldInfo] = section.__pydantic_fields__  # type: ignore[attr-defined]
    for name, info in fields.items():
        node = schema["properties"][name]
        nested = _nested_section(info)
        yield Setting(
            path=(*path, name),
            documentation=_one_line(info.description or (nested.__doc__ if nested else "") or ""),
            kind=_section_kind(info) if nested else _kind(node),
            default=_default(info),
            is_section=nested is not None,
        )
        if nested is not None:
            yield from settings(nested, (*path, name))


def help_text(section: type) -> str:
    """What ``--help`` shows: every setting of ``section`` with type, default and documentation."""
    lines = ["settings (in CONFIG, or as key=value):"]
    for setting in settings(section):
        if setting.is_section:
            note = f" ({setting.kind})" if setting.kind else ""
            lines += ["", *_wrap(f"{'.'.join(setting.path)}: {setting.documentation}{note}", "  ")]
            continue
        default = "required" if setting.default == REQUIRED else f"default {setting.default}"
        lines.append(f"    {'.'.join(setting.path)}  ({setting.kind}; {default})")
        lines += _wrap(setting.documentation, "        ")
    return "\n".join(lines)


def reference(section: type) -> str:
    """A YAML document with every setting of ``section``, commented, at its default."""
    document = _one_line(section.__doc__ or "")
    lines = _wrap(document, "# ")
    for setting in settings(section):
        indent = "  " * (len(setting.path) - 1)
        notes = [setting.kind] if setting.kind else []
        if not setting.is_section and setting.default == REQUIRED:
            notes.append("required")
        if len(setting.path) == 1:
            lines.append("")
        lines += _wrap(setting.documentation, f"{indent}# ")
        lines += _wrap("; ".join(notes), f"{indent}# ")
        value = "" if setting.is_section else f" {setting.default}"
        lines.append(f"{indent}{setting.path[-1]}:{value}")
    return "\n".join(lines) + "\n"


def reference_file() -> str:
    """The content of ``docs/config_reference.yaml``: one document for each entry point."""
    head = "".join(f"# {line}\n" for line in _REFERENCE_HEAD.splitlines())
    return head + "".join(f"---\n{reference(tree)}" for tree in (SodConfig, SftConfig, EvalConfig))


def _nested_section(info: FieldInfo) -> type | None:
    """The section class of a field that is ``Section`` or ``Section | None``."""
    if get_origin(info.annotation) is dict:  # of sections, by names that the user gives
        return None
    candidates = [info.annotation, *getattr(info.annotation, "__args__", ())]
    found = [c for c in candidates if hasattr(c, "__pydantic_fields__")]
    return found[0] if found else None


def _section_kind(info: FieldInfo) -> str:
    return "optional section, left out by default" if info.default is None else ""


def _kind(node: dict[str, Any]) -> str:
    """Type and allowed values in words, from a JSON schema."""
    if "anyOf" in node:
        return " or ".join(_kind(option) for option in node["anyOf"])
    if "enum" in node:
        return "one of " + ", ".join(str(value) for value in node["enum"])
    if node["type"] == "array":
        if "prefixItems" in node:
            return "list of " + ", ".join(_kind(item) for item in node["prefixItems"])
        return f"list of {_kind(node['items'])}"
    words = {
        "string": "text",
        "boolean": "true or false",
        "object": "mapping",
        "null": "null",
        "integer": "integer",
        "number": "number",
    }
    return words[node["type"]] + _bounds(node)


def _bounds(node: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {node[key]:g}" for key, sign in signs.items() if key in node]
    return " " + " and ".join(bounds) if bounds else ""


def _default(info: FieldInfo) -> str:
    """The default as YAML in one line."""
    if info.is_required():
        return REQUIRED
    value = info.get_default(call_default_factory=True, validated_data={})
    if hasattr(value, "__pydantic_fields__"):
        return ""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, float):
        # PyYAML reads "1e-06" as text: YAML 1.1 wants the point.
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    dumped = yaml.safe_dump(value, default_flow_style=True, width=WIDTH)
    return dumped.removesuffix("...\n").strip()


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "").split())


def _wrap(text: str, indent: str) -> list[str]:
    wrap = partial(textwrap.wrap, initial_indent=indent, subsequent_indent=indent)
    return wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.stdout.write(reference_file())
