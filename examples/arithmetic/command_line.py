"""What the scripts of this folder share: arguments, settings, and folders written as a whole."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.arithmetic.settings import ArithmeticSettings
from sod_mcore.config import ConfigError
from sod_mcore.config_file import fail, load_config

RECIPE = Path(__file__).with_name("recipe.yaml")


def make_parser(description: str, output_help: str) -> argparse.ArgumentParser:
    """A parser with --output, --recipe and key=value overrides."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help=output_help)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", help="settings, as data.train_prompts=100")
    return parser


def load_settings(arguments: argparse.Namespace) -> ArithmeticSettings:
    """The settings that the arguments ask for; ends the process if they cannot work."""
    try:
        return load_config(ArithmeticSettings, arguments.recipe, arguments.overrides)
    except ConfigError as error:
        fail(str(error))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its name once everything in it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
