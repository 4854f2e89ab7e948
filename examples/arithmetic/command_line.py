"""What the scripts of this folder share: arguments and settings."""

from __future__ import annotations

import argparse
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
