"""Files and folders appear whole, or not at all."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sod_mcore import files
from sod_mcore.files import (
    atomic_file,
    atomic_folder,
    create_text,
    temporary_folder,
    write_text,
)

REPLACEMENTS = 200
READER = """
import json, os, pathlib, sys
folder, stop = map(pathlib.Path, sys.argv[1:])
polls, missing = 0, 0
print("reads", flush=True)
while not stop.exists():
    for name in ("first", "below/last"):
        try:
            os.close(os.open(folder / name, os.O_RDONLY))
        except FileNotFoundError:
            missing += 1
    polls += 1
print(json.dumps({"polls": polls, "missing": missing}))
"""
"""Opens both files of a folder by their paths, again and again, until a file ``stop`` is there."""


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


def test_writers_with_one_process_id_do_not_share_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes that write into one folder may have the same id."""
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    path = tmp_path / "file"
    with atomic_file(path) as first:
        first.write(b"first, which is longer")
        with atomic_file(path) as second:
            second.write(b"second")
            assert len(os.listdir(tmp_path)) == 2
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first, which is longer"
    assert os.listdir(tmp_path) == ["file"]


def test_a_created_file_never_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    assert create_text(path, "first")
    assert not create_text(path, "second")
    assert path.read_text() == "first"
    write_text(path, "third")
    assert not create_text(path, "fourth")
    assert path.read_text() == "third"
    assert list(path.parent.iterdir()) == [path]


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


def replace_under_a_reader(tmp_path: Path) -> dict[str, int]:
    """Replace a folder 200 times; how often another process looked, and what it missed."""
    path, stop = tmp_path / "parent" / "folder", tmp_path / "stop"
    write_version(path, 0)
    command = [sys.executable, "-c", READER, str(path), str(stop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reads\n"
        try:
            for version in range(1, REPLACEMENTS + 1):
                write_version(path, version)
        finally:
            stop.touch()
        seen: dict[str, int] = json.loads(reader.stdout.readline())
    assert (path / "below" / "last").read_text() == f"{REPLACEMENTS}"
    assert os.listdir(path.parent) == ["folder"]
    return seen


def write_version(path: Path, version: int) -> None:
    with atomic_folder(path) as folder:
        (folder / "first").write_text(f"{version}")
        (folder / "below").mkdir()
        (folder / "below" / "last").write_text(f"{version}")


def test_a_folder_is_there_at_every_moment_of_its_replacement(tmp_path: Path) -> None:
    seen = replace_under_a_reader(tmp_path)
    assert seen["polls"] > REPLACEMENTS
    assert seen["missing"] == 0


def test_a_folder_is_replaced_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "RENAME_EXCHANGE", 1 << 20)  # a flag that no kernel knows
    replace_under_a_reader(tmp_path)


def test_a_link_is_replaced_and_what_it_led_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    for version in range(2):
        write_version(tmp_path / "link", version)
    assert (tmp_path / "link" / "first").read_text() == "1"
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link"]


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
