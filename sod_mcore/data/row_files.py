"""Opens what rows come from: a Parquet, JSONL or JSON file, or a Hugging Face data set.

A line that is no JSON object is a wrong row, not a wrong file: it is handed on as a FieldError, so
that the rows after it are judged as well.
"""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from sod_mcore.config import HUB_PREFIX
from sod_mcore.data.errors import DataError, FieldError, one_line, shortened

# Rows of the published training set hold up to megabytes of unit tests; few at a time are enough.
_PARQUET_BATCH_ROWS = 256
_JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz")
_FILE_SUFFIXES = (".parquet", *_JSON_LINES, ".json")


def iterate_rows(source: Path | str) -> Iterator[dict[str, Any] | FieldError]:
    """The rows of ``source`` in order; in place of a line that is no row, what is wrong with it.

    Args:
        source: a file (.parquet, .jsonl, .ndjson, .jsonl.gz, or .json with a list), or
            ``hf:NAME[:SPLIT]``, or ``hf:NAME:FILE`` for one file of a data set's repository.

    Raises:
        DataError: there is no such file or data set, or it cannot be read at all.
    """
    name = str(source)
    if name.startswith(HUB_PREFIX):
        return _hub_rows(name)
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; give the path of a Parquet or JSONL file, or hf:NAME[:SPLIT]"
        )
    if name.endswith(".parquet"):
        return _parquet_rows(path)
    if name.endswith(_JSON_LINES):
        return _json_lines(path)
    if name.endswith(".json"):
        return _json_list(path)
    raise DataError(f"{path}: the name ends with none of {', '.join(_FILE_SUFFIXES)}; rename it")


def source_name(source: Path | str) -> str:
    """A short name for ``source``: the file's without its ending, or the data set's."""
    name = str(source)
    if name.startswith(HUB_PREFIX):
        name, _, part = name.removeprefix(HUB_PREFIX).partition(":")
        name = part if part.endswith(_FILE_SUFFIXES) else name
    base = name.rpartition("/")[2]
    return next((base.removesuffix(s) for s in _FILE_SUFFIXES if base.endswith(s)), base)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {one_line(error)}") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any] | FieldError]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from _parsed_lines(file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


def _parsed_lines(file: BinaryIO | gzip.GzipFile) -> Iterator[dict[str, Any] | FieldError]:
    for number, line in enumerate(map(bytes.strip, file), start=1):
        if not line:
            continue
        try:
            yield _json_object(f"line {number}", json.loads(line))
        except (ValueError, RecursionError) as error:
            text = shortened(line.decode(errors="replace"))
            problem = f"is {text}; a JSON object is needed ({one_line(error)})"
            yield FieldError(f"line {number}", problem)


def _json_list(path: Path) -> Iterator[dict[str, Any] | FieldError]:
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as JSON: {one_line(error)}; if it has one object a line, give "
            "it the ending .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {shortened(rows)}; a JSON list of objects is needed")
    for number, row in enumerate(rows):
        yield _json_object(f"item {number}", row)


def _json_object(place: str, value: Any) -> dict[str, Any] | FieldError:
    if isinstance(value, dict):
        return value
    return FieldError(place, f"is {shortened(value)}; a JSON object is needed")


def _hub_rows(source: str) -> Iterator[dict[str, Any]]:
    name, _, part = source.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise DataError(f"{source}: no data set is named; give hf:NAME[:SPLIT]")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{source}: the package datasets is not installed ({one_line(error)}); run pip install "
            "'sod_mcore[datasets]', or give a local Parquet or JSONL file"
        ) from error
    yield from _loaded(datasets, source, name, part)


def _loaded(datasets: Any, source: str, name: str, part: str) -> Iterable[dict[str, Any]]:
    options = {"split": part or "train"}
    if part.endswith(_FILE_SUFFIXES):
        options = {"split": "train", "data_files": part}
    try:
        # The package's own requests have timeouts (HF_HUB_DOWNLOAD_TIMEOUT, 10 seconds).
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, **options)
    except Exception as error:  # from five packages, without a common class
        raise DataError(
            f"{source} cannot be loaded ({type(error).__name__}: {one_line(error)}); check the "
            "name and the network, or give a local Parquet or JSONL file"
        ) from error
    return rows
