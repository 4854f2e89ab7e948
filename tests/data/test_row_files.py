"""Every kind of file gives the same rows; what is no row is named and the rest still read."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sod_mcore.data.errors import DataError, FieldError
from sod_mcore.data.row_files import iterate_rows, source_name

# The header of a sound file, and then a kind of block that there is none of.
DAMAGED = gzip.compress(b'{"a": 1}\n', mtime=0)[:10] + b"\xff" * 40
ROWS = [{"a": 1, "b": ["x", None]}, {"a": 2, "b": []}]


def write(path: Path, rows: list[Any]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match path.name.partition(".")[2]:
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case "json":
            path.write_text(json.dumps(rows))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case _:
            path.write_text(lines)
    return path


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "ndjson", "jsonl.gz", "json"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"rows.{ending}", ROWS)
    assert list(iterate_rows(path)) == ROWS
    assert list(iterate_rows(str(path))) == ROWS
    assert source_name(path) == "rows"


def test_more_rows_than_are_read_at_a_time_keep_their_order(tmp_path: Path) -> None:
    rows = [{"a": number} for number in range(1000)]
    assert list(iterate_rows(write(tmp_path / "rows.parquet", rows))) == rows


def test_a_bad_line_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a":\n[2]\n"\xff"\n{"a": 3}\n')
    rows = list(iterate_rows(path))
    assert [row for row in rows if isinstance(row, dict)] == [{"a": 1}, {"a": 3}]
    problems = [str(row) for row in rows if isinstance(row, FieldError)]
    assert problems[0].startswith(
        """line 3: is '{"a":'; a JSON object is needed (Expecting value"""
    )
    assert problems[1] == "line 4: is [2]; a JSON object is needed"
    assert problems[2].startswith("line 5: is ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.parquet", b"hello", "rows.parquet cannot be read as Parquet: "),
        ("rows.json", b'{"a": 1}\n{"a": 2}\n', "if it has one object a line, give it the ending"),
        ("rows.json", b'{"a": 1}', "holds {'a': 1}; a JSON list of objects is needed"),
        ("rows.jsonl.gz", b"hello", "rows.jsonl.gz cannot be read: "),
        ("rows.jsonl.gz", DAMAGED, "rows.jsonl.gz cannot be read: Error -3 while decompressing"),
        ("rows.csv", b"a,b", "the name ends with none of .parquet, .jsonl, "),
        ("", b"", "no such file; give the path of a Parquet or JSONL file, or hf:NAME"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(iterate_rows(tmp_path / name))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "name", "options"),
    [
        ("hf:org/set", "set", {"split": "train"}),
        ("hf:org/set:test", "set", {"split": "test"}),
        ("hf:org/set:d/x.parquet", "x", {"split": "train", "data_files": "d/x.parquet"}),
    ],
)
def test_a_data_set_of_the_hub_is_loaded(
    monkeypatch: pytest.MonkeyPatch, source: str, name: str, options: dict[str, str]
) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, **options: str) -> list[dict[str, Any]]:
        asked.append((name, options))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(iterate_rows(Path(source))) == ROWS
    assert asked == [("org/set", options)]
    assert source_name(source) == name


def test_a_data_set_that_cannot_be_loaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, **options: str) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"loaded \(ConnectionError: no route to host\); check the"):
        list(iterate_rows("hf:org/set"))
    with pytest.raises(DataError, match="no data set is named"):
        list(iterate_rows("hf:"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"not installed .*pip install 'sod_mcore\[datasets\]'"):
        list(iterate_rows("hf:org/set"))
