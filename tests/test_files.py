"""Files and folders appear whole, or not at all."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sod_mcore.files import atomic_file, atomic_folder, temporary_folder, write_text


def test_a_file_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with atomic_file(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert os.listdir(path.parent) == ["file"]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")

    def fail() -> None:
        with atomic_file(tmp_path / "file") as file:
            file.write(b"new")
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        fail()
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_names_the_file(tmp_path: Path) -> None:
    with only_kilobytes(1), pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        write_text(tmp_path / "file", "x" * 2000)
    assert os.listdir(tmp_path) == []


@contextmanager
def only_kilobytes(limit: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond ``limit``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit << 10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_replaces_the_old_one_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "folder"
    for content in ("old", "new"):
        with atomic_folder(path) as folder:
            (folder / "below").mkdir()
            (folder / "below" / content).write_text(content)
            assert not (path / "below" / content).exists()
        assert os.listdir(path / "below") == [content]
    assert os.listdir(path.parent) == ["folder"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic_folder(path) as folder:
        (folder / "file").write_text("old")

    def fail() -> None:
        with atomic_folder(path) as folder:
            (folder / "file").write_text("new")
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        fail()
    assert (path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["folder"]


def test_what_a_killed_process_left_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    left = temporary_folder(path)
    left.mkdir()
    (left / "half").write_text("a file")
    with atomic_folder(path) as folder:
        (folder / "whole").write_text("a file")
    assert os.listdir(path) == ["whole"]
    assert os.listdir(tmp_path) == ["folder"]
