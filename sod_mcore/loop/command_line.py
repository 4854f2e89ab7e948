"""The command line that every entry point shares: CONFIG, then ``key=value`` overrides."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from sod_mcore.config import ConfigError
from sod_mcore.config_file import fail, load_config
from sod_mcore.config_help import help_text

Section = TypeVar("Section")

_SHORTCUTS = ("record", "replay")


def read_command_line(
    section: type[Section], description: str, arguments: Sequence[str], *, shortcuts: bool = False
) -> Section:
    """Parse ``CONFIG [key=value ...]`` into ``section``.

    ``--record DIR`` and ``--replay FILE`` are short for ``run.record=DIR`` and ``run.replay=FILE``
    where ``shortcuts`` is set. A bad setting ends the process with one line and exit code 2.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=help_text(section),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override one setting")
    if shortcuts:
        parser.add_argument("--record", metavar="DIR", help="write each step's trajectories there")
        parser.add_argument("--replay", metavar="FILE", help="train on recorded trajectories")
    options = parser.parse_intermixed_args(arguments)
    overrides = list(options.overrides)
    for name in _SHORTCUTS if shortcuts else ():
        if getattr(options, name) is not None:
            overrides.append(f"run.{name}={getattr(options, name)}")
    try:
        return load_config(section, options.config, overrides)
    except ConfigError as error:
        fail_once(str(error))


def fail_once(message: str) -> NoReturn:
    """Like :func:`fail`, but only global rank 0 prints: every rank finds the same fault."""
    if os.environ.get("RANK", "0") == "0":
        fail(message)
    raise SystemExit(2)
