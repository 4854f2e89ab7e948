"""Fills the ``@NAME@`` places of a template in ``scripts/slurm/``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from sod_mcore.config import ConfigError

REPOSITORY = Path(__file__).parents[2]
PLACE = re.compile(r"@([A-Z_]+)@")


def read_template(name: str, repository: Path = REPOSITORY) -> str:
    """The text of ``scripts/slurm/NAME.sbatch``.

    Raises:
        ConfigError: the package was installed without the repository.
    """
    path = repository / "scripts" / "slurm" / f"{name}.sbatch"
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; sod slurm needs a checkout of the repository, installed with "
            "pip install -e ."
        )
    return path.read_text()


def fill(template: str, values: Mapping[str, str | None]) -> str:
    """Put ``values`` in place; an ``#SBATCH`` line whose value is None is left out.

    Raises:
        KeyError: the template has a place for which there is no value.
    """
    lines = []
    for line in template.splitlines():
        if not line.startswith("#SBATCH") and not _is_assignment(line):
            lines.append(line)
            continue
        names = PLACE.findall(line)
        if any(values[name] is None for name in names):
            continue
        lines.append(PLACE.sub(lambda place: values[place[1]] or "", line))
    return "\n".join(lines) + "\n"


def quote(*words: str) -> str:
    """Words as bash reads them back; plain ones stay without quotes."""
    return shlex.join(words)


def _is_assignment(line: str) -> bool:
    return re.match(r"[A-Z_]+=", line) is not None
