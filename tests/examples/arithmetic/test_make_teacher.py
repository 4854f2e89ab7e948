"""The command lines that make a recipe's teacher: all of its own folder and recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.arithmetic.experiment import CASCADE, HERE
from examples.arithmetic.make_teacher import stages
from sod_mcore.config import SftConfig, SodConfig
from sod_mcore.config_file import load_config
from tests.end_to_end.programs import REPOSITORY

FOLDER = Path("runs/elsewhere")


@pytest.mark.parametrize("recipe", [HERE, CASCADE])
def test_everything_is_made_in_the_given_folder(recipe: Path) -> None:
    for stage in stages(recipe, FOLDER, None):
        assert stage.result.parent == FOLDER
        words = [word for command in stage.commands for word in command]
        files = [word for word in words if word.endswith(".yaml")]
        assert {Path(file).parent for file in files} == {recipe}


@pytest.mark.parametrize("recipe", [HERE, CASCADE])
def test_the_overrides_are_settings(recipe: Path) -> None:
    kinds: dict[str, type[SftConfig] | type[SodConfig]] = {
        "sft_teacher.yaml": SftConfig,
        "sod.yaml": SodConfig,
    }
    found = set()
    for command in (stage.commands[0] for stage in stages(recipe, FOLDER, None)[3:]):
        overrides = [word for word in command if "=" in word]
        file = next(Path(word) for word in command if word.endswith(".yaml"))
        config = load_config(kinds[file.name], REPOSITORY / file, overrides)
        assert str(FOLDER) in repr(config)
        found.add(file.name)
    assert found == set(kinds)


def test_a_given_tokenizer_is_used() -> None:
    """Its stage has a result that exists, so it is skipped."""
    made = {stage.name: stage for stage in stages(CASCADE, FOLDER, HERE / "teacher")}
    assert made["tokenizer"].result == HERE / "teacher"
    assert str(HERE / "teacher") in made["models"].commands[0]
