"""Folders of Python packages that sandboxed programs may import.

They are looked at before anything starts: a folder that the sandbox cannot read would otherwise
look like a machine that cannot isolate.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from sod_mcore.config import ConfigError
from sod_mcore.tools.bubblewrap import launch_user


def package_folders(paths: Sequence[str], setting: str) -> list[Path]:
    """The folders themselves, without links on the way.

    Args:
        paths: as they were written.
        setting: what an error calls them, `tools.packages`.

    Raises:
        ConfigError: one is no folder, or those who run the programs may not read it.
    """
    return [_package_folder(path, setting) for path in paths]


def _package_folder(path: str, setting: str) -> Path:
    folder = Path(os.path.realpath(path))
    if not os.path.isdir(folder):  # False also where we may not look, unlike Path.is_dir
        raise ConfigError(
            f"{setting} has {path!r}, which is no folder here; give one of Python packages, as "
            "`pip install --target` makes it"
        )
    barrier = _barrier(folder)
    if barrier is not None:
        raise ConfigError(
            f"{setting} has {path!r}, but the user who runs the programs (id "
            f"{launch_user() or os.geteuid()}) may not read {barrier}; make it readable (chmod "
            "a+rX), or move the packages to another folder"
        )
    return folder


def _barrier(folder: Path) -> Path | None:
    """The folder, or the first one above it, that the user who runs the programs cannot read or
    enter."""
    if launch_user() is None:
        return None if os.access(folder, os.R_OK | os.X_OK) else folder
    for step in reversed(folder.parents):
        if not step.stat().st_mode & stat.S_IXOTH:
            return step
    needed = stat.S_IROTH | stat.S_IXOTH
    return None if folder.stat().st_mode & needed == needed else folder
