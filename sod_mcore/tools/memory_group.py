"""Bounds the memory of all sandboxed programs together, by a control group of the kernel.

Resource limits count address space by process, so the sum over processes and programs is bounded by
their product only. A group bounds what is really used. Interpreters enter it while they wait for
their program, which cannot leave again: it sees no control groups.

Version 1 allows a group inside our own. Version 2 allows that only where no process runs beside it;
there the group usually becomes our sibling, if the parent is ours to change (a user's systemd
session, a delegated scope) and passes the memory controller on.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sod_mcore.tools.interface import InfrastructureError, SandboxUnavailableError

_REMOVAL_SECONDS = 5.0
_MEND = (
    "What makes it work: run under `systemd-run --user --scope -p Delegate=yes`, as root on the "
    "machine itself, or in a container that may write its control groups; or set "
    "tools.total_memory_mb to null, which leaves the limits of each process."
)


@dataclass(frozen=True)
class Hierarchy:
    """The tree of groups that this process is in.

    Attributes:
        mount: where the tree is mounted.
        own: the group of this process, a path below `mount`.
        version: of the kernel's interface, 1 or 2.
    """

    mount: Path
    own: Path
    version: int

    def parents(self) -> list[Path]:
        """Groups in which another may be made, the preferred one first."""
        if self.version == 1 or self.own == self.mount:
            return [self.own]
        return [self.own, self.own.parent]


def find_hierarchies(memberships: str, mounts: str) -> list[Hierarchy]:
    """Trees with a memory controller, from the text of /proc/self/cgroup and /proc/self/mountinfo.

    Version 1 comes first: where both are mounted, memory usually belongs to it.
    """
    own: dict[int, str] = {}
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            own[2] = path
        elif "memory" in controllers.split(","):
            own[1] = path
    found = []
    for line in mounts.splitlines():
        mount, _, file_system = line.partition(" - ")
        root, mount_point = mount.split()[3:5]
        kind, _, options = file_system.split()[:3]
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version in own and (version == 2 or "memory" in options.split(",")):
            # In a container the mount may show a part of the tree only.
            inside = own[version].removeprefix(root.rstrip("/")).lstrip("/")
            found.append(Hierarchy(Path(mount_point), Path(mount_point) / inside, version))
    return sorted(found, key=lambda hierarchy: hierarchy.version)


class MemoryGroup:
    """A control group. Made by `create`, removed by `close`; also a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(
        cls, limit_bytes: int, hierarchies: Sequence[Hierarchy] | None = None
    ) -> "MemoryGroup":
        """Make a group whose processes together use at most `limit_bytes`, swap included.

        Args:
            limit_bytes: the limit; a page more or less, as the kernel rounds.
            hierarchies: where to try; by default those of this process.

        Raises:
            SandboxUnavailableError: no group can be made; the message says what was tried.
        """
        if hierarchies is None:
            hierarchies = find_hierarchies(
                Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text()
            )
        failures = []
        for hierarchy in hierarchies:
            for parent in hierarchy.parents():
                try:
                    return cls(_make_group(parent, hierarchy.version, limit_bytes))
                except OSError as error:
                    failures.append(f"{parent}: {error.strerror or error}")
        tried = "; ".join(failures) or "no control groups are mounted"
        raise SandboxUnavailableError(
            f"tools.total_memory_mb = {limit_bytes >> 20}: no control group for memory can be made "
            f"here ({tried}). {_MEND}"
        )

    def add(self, pid: int) -> None:
        """Put a process into the group; its later children and its later memory count there.

        Raises:
            InfrastructureError: the group is gone or refuses the process.
        """
        try:
            (self.path / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except OSError as error:
            raise InfrastructureError(
                f"a sandbox could not enter the control group {self.path}: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Remove the group, whose processes must have ended; the kernel may need a moment.

        Raises:
            OSError: it still holds processes after some seconds.
        """
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while self.path.exists():
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def __enter__(self) -> "MemoryGroup":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _make_group(parent: Path, version: int, limit_bytes: int) -> Path:
    """A new group below `parent`, with its limit; nothing is left behind by a failure."""
    if version == 2:
        _pass_memory_on(parent)
    path = parent / f"sod-sandbox-{os.getpid()}-{time.monotonic_ns():x}"
    path.mkdir()
    limit, with_swap = {
        1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
        2: ("memory.max", "memory.swap.max"),
    }[version]
    try:
        (path / limit).write_text(str(limit_bytes), encoding="ascii")
        if (path / with_swap).exists():  # absent where the kernel does not count swap
            swap_limit = limit_bytes if version == 1 else 0
            (path / with_swap).write_text(str(swap_limit), encoding="ascii")
    except OSError:
        path.rmdir()
        raise
    return path


def _pass_memory_on(parent: Path) -> None:
    """Version 2: let groups below `parent` have limits of memory; an OSError where it cannot be."""
    control = parent / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory", encoding="ascii")
