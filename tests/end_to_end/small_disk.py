"""A disk of a few megabytes, which needs no rights: a tmpfs in a mount namespace of its own.

Only processes that enter the namespace write to it; the test looks in through the process that
holds it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.programs import REPOSITORY


@dataclass(frozen=True)
class SmallDisk:
    """A mounted disk.

    Attributes:
        mount: its folder, for those inside.
        holder: the process whose end unmounts it.
    """

    mount: Path
    holder: int

    @property
    def seen_from_outside(self) -> Path:
        """The same folder, for the test."""
        return Path(f"/proc/{self.holder}/root{self.mount}")

    def inside(self, command: Sequence[str]) -> list[str]:
        """``command``, started where it sees the disk."""
        enter = ("nsenter", "--target", str(self.holder), "--user", "--mount")
        return [*enter, "--preserve-credentials", f"--wd={REPOSITORY}", *command]

    def resize(self, kilobytes: int) -> None:
        """Change what the disk can hold."""
        remount = ("mount", "-o", f"remount,size={kilobytes}k", str(self.mount))
        subprocess.run(self.inside(remount), check=True, timeout=30)


@contextmanager
def small_disk(mount: Path, kilobytes: int) -> Iterator[SmallDisk]:
    """Mount a disk of ``kilobytes`` on the new folder ``mount``."""
    mount.mkdir()
    script = f"mount -t tmpfs -o size={kilobytes}k tmpfs '{mount}' && echo mounted && exec cat"
    command = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script)
    # The last program ends when its input does: at the end of the block, or of the test's process.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mounted\n"
        yield SmallDisk(mount, holder.pid)
