"""A Hugging Face folder for which a disk has no room: what is said, and what stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.programs import TEACHER
from tests.end_to_end.small_disk import small_disk

PROGRAM = """
import sys
import torch
from sod_mcore.loop.causes import cause_of
from sod_mcore.student.conversion.save import save_hf_folder

source, destination, kilobytes = sys.argv[1:]
buckets = [[(f"weight.{i}", torch.zeros(int(kilobytes) << 8))] for i in range(2)]
try:
    save_hf_folder(buckets, source, destination)
except OSError as error:
    print(cause_of(error).line)
    print(cause_of(error).is_expected)
else:
    print("written")
"""
KILOBYTES = 1024


@pytest.mark.parametrize(
    ("weights", "other_file"),
    [(100, 0), (KILOBYTES, 0), (100, KILOBYTES)],
    ids=["there is room", "no room for the weights", "no room for another file"],
)
def test_a_full_disk_is_named_with_the_folder(
    weights: int, other_file: int, tmp_path: Path
) -> None:
    """Weights are written by safetensors, the other files by shutil: neither would name it."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((TEACHER / "config.json").read_bytes())
    (source / "vocabulary.json").write_bytes(bytes(other_file << 10))
    with small_disk(tmp_path / "disk", KILOBYTES) as disk:
        folder = disk.mount / "version"
        seen = disk.seen_from_outside
        (seen / "version").mkdir()
        (seen / "version" / "before").touch()
        command = [sys.executable, "-c", PROGRAM, str(source), str(folder), str(weights)]
        done = subprocess.run(
            disk.inside(command), capture_output=True, text=True, timeout=120, check=True
        )
        left = {path.name for path in seen.iterdir()}
        files = {path.name for path in (seen / "version").iterdir()}
    assert left == {"version"}
    if weights + other_file < KILOBYTES:
        assert done.stdout == "written\n"
        assert "before" not in files
        return
    full = f"{folder}: No space left on device; make room, and the same command continues"
    assert done.stdout.startswith(full)
    assert done.stdout.endswith("\nTrue\n")
    assert files == {"before"}
