"""The generated reference: it is committed, complete, and what it shows is what a run gets."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from sod_mcore.config import ConfigError, SftConfig, SodConfig
from sod_mcore.config_file import load_config
from sod_mcore.config_help import REQUIRED, help_text, reference, reference_file, settings

COMMITTED = Path(__file__).parents[1] / "docs" / "config_reference.yaml"


def test_the_committed_reference_is_the_generated_one() -> None:
    assert COMMITTED.read_text() == reference_file(), "run `make docs` and commit the result"


@pytest.mark.parametrize("section", [SodConfig, SftConfig])
def test_the_reference_loads_and_gives_the_defaults(section: type, tmp_path: Path) -> None:
    tree = yaml.safe_load(reference(section))
    tree.pop("serving", None)
    filled = tmp_path / "filled.yaml"
    filled.write_text(yaml.safe_dump(_fill(tree)))
    only_required = tmp_path / "required.yaml"
    only_required.write_text(yaml.safe_dump(_keep_required(tree)))
    assert load_config(section, filled) == load_config(section, only_required)


def test_the_reference_shows_optional_sections_whole(tmp_path: Path) -> None:
    tree = yaml.safe_load(reference(SodConfig))
    path = tmp_path / "filled.yaml"
    path.write_text(yaml.safe_dump(_fill(tree)))
    serving = load_config(SodConfig, path).serving
    assert serving is not None
    assert serving.teacher is not None
    assert serving.teacher.model_path == "1"


def test_every_field_is_there_and_documented() -> None:
    shown = {setting.path: setting for setting in settings(SodConfig)}
    config_fields = {(f.name,) for f in fields(SodConfig)}
    assert config_fields == {path for path in shown if len(path) == 1}
    assert ("serving", "teacher", "extra_args") in shown
    undocumented = [setting.path for setting in shown.values() if not setting.documentation]
    assert not undocumented


def test_a_setting_shows_type_bounds_choices_and_default() -> None:
    shown = {".".join(setting.path): setting for setting in settings(SodConfig)}
    assert (shown["run.steps"].kind, shown["run.steps"].default) == ("integer > 0", "100")
    assert shown["run.directory"].default == REQUIRED
    assert shown["algorithm.clip_low"].kind == "number >= 0 and < 1"
    assert shown["report.wandb"].kind == "one of offline, online, disabled"
    assert shown["algorithm.tis_cap"].kind == "number > 0 or null"
    assert yaml.safe_load(shown["optimizer.lr"].default) == 1e-6


def test_help_names_every_setting_in_lines_that_fit() -> None:
    text = help_text(SodConfig)
    for setting in settings(SodConfig):
        assert ".".join(setting.path) in text
    assert max(map(len, text.splitlines())) <= 120


def test_an_unfilled_reference_is_refused(tmp_path: Path) -> None:
    """The mark of a required setting is no value that a run would start with."""
    path = tmp_path / "unfilled.yaml"
    path.write_text(reference(SftConfig))
    with pytest.raises(ConfigError, match=r"sft\.updates is '\?\?\?'"):
        load_config(SftConfig, path)


def _fill(node: Any) -> Any:
    """The tree with "1" for every required value, which is text and reads as an integer too."""
    if isinstance(node, dict):
        return {key: _fill(value) for key, value in node.items()}
    return "1" if node == REQUIRED else node


def _keep_required(node: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in node.items():
        if value == REQUIRED:
            kept[key] = "1"
        elif isinstance(value, dict) and (below := _keep_required(value)):
            kept[key] = below
    return kept
