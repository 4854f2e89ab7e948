"""The bound of memory over all programs: the kernel's groups where this machine lets us make one,
and on any machine the files that are written and the refusal."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from sod_mcore.tools import InfrastructureError, MemoryGroup, Sandbox, SandboxUnavailableError
from sod_mcore.tools.memory_group import Hierarchy, find_hierarchies

MEBIBYTE = 1 << 20

HOLD_80_MIB = """
import time
held = bytearray(80 << 20)
for place in range(0, len(held), 4096):
    held[place] = 1
time.sleep(2)
print("held")
"""


def test_hierarchies_of_version_1() -> None:
    memberships = "9:name=systemd:/\n4:cpu,memory:/jobs/7\n0::/\n"
    mounts = (
        "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
        "32 31 0:29 / /sys/fs/cgroup/cpuset rw shared:4 - cgroup cgroup rw,cpuset\n"
        "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:5 - cgroup cgroup rw,cpu,memory\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    )
    first, second = find_hierarchies(memberships, mounts)
    assert first == Hierarchy(
        Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/memory/jobs/7"), 1
    )
    assert first.parents() == [first.own]
    assert (second.version, second.parents()) == (2, [Path("/sys/fs/cgroup/unified")])


def test_hierarchies_of_version_2() -> None:
    user = "/user.slice/user-1000.slice/user@1000.service/app.slice/run-1.scope"
    mounts = "29 22 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
    (found,) = find_hierarchies(f"0::{user}\n", mounts)
    own = Path(f"/sys/fs/cgroup{user}")
    assert found.parents() == [own, own.parent]


def test_mount_of_a_part_of_the_tree() -> None:
    """As Docker shows version 1: both files name the path on the host."""
    mounts = "50 49 0:30 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    (found,) = find_hierarchies("4:memory:/docker/abc\n", mounts)
    assert found.own == found.mount == Path("/sys/fs/cgroup/memory")


class TestFiles:
    """In folders of our own; a file appears where the kernel would have one."""

    def test_version_2_beside_us(self, tmp_path: Path) -> None:
        own = tmp_path / "slice" / "scope"
        own.mkdir(parents=True)
        (own.parent / "cgroup.subtree_control").write_text("cpu memory\n")
        group = MemoryGroup.create(5 * MEBIBYTE, [Hierarchy(tmp_path, own, 2)])
        assert group.path.parent == own.parent
        assert (group.path / "memory.max").read_text() == str(5 * MEBIBYTE)
        group.add(123)
        assert (group.path / "cgroup.procs").read_text() == "123"

    def test_version_2_asks_for_the_controller(self, tmp_path: Path) -> None:
        (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
        group = MemoryGroup.create(MEBIBYTE, [Hierarchy(tmp_path, tmp_path, 2)])
        assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
        assert group.path.parent == tmp_path

    def test_removal(self, tmp_path: Path) -> None:
        path = tmp_path / "group"
        path.mkdir()
        with MemoryGroup(path):
            assert path.exists()
        assert not path.exists()

    def test_group_that_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(InfrastructureError, match="could not enter the control group"):
            MemoryGroup(tmp_path / "missing").add(os.getpid())


def test_refusal(tmp_path: Path) -> None:
    read_only = Path("/proc/self")  # nobody can make a folder there, root included
    for hierarchies, tried in (
        ([Hierarchy(tmp_path, read_only, 1)], str(read_only)),
        ([Hierarchy(tmp_path, tmp_path / "missing", 2)], "No such file"),
        ([], "no control groups are mounted"),
    ):
        with pytest.raises(SandboxUnavailableError, match=r"tools\.total_memory_mb = 100") as error:
            MemoryGroup.create(100 * MEBIBYTE, hierarchies)
        assert tried in str(error.value)
        assert "systemd-run --user --scope -p Delegate=yes" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
async def test_programs_share_the_bound(nothing_left_behind: None) -> None:
    """Two programs of 80 MiB each under 128 MiB together; where no group can be made, the refusal
    is all that there is."""
    group = None
    with contextlib.suppress(SandboxUnavailableError):
        group = MemoryGroup.create(128 * MEBIBYTE)
    if group is None:
        with pytest.raises(SandboxUnavailableError, match=r"tools\.total_memory_mb = 128"):
            MemoryGroup.create(128 * MEBIBYTE)
        return
    with group:
        async with Sandbox(memory_group=group, warm_count=1) as sandbox:
            alone = await sandbox.run(HOLD_80_MIB)
            assert (alone.status, alone.stdout) == ("finished", "held\n")
            both = await asyncio.gather(*(sandbox.run(HOLD_80_MIB) for _ in range(2)))
            assert sorted(result.status for result in both) == ["finished", "killed"]
            assert (await sandbox.run("print('next')")).stdout == "next\n"
    assert not group.path.exists()
