"""Write a Hugging Face folder: weights from buckets, everything else copied from a source folder.

The folder appears under its name only when it is complete: it is written under a temporary name,
synced and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sod_mcore.files import atomic_folder, naming_full_disk
from sod_mcore.student.conversion.export import NamedTensors

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def save_hf_folder(
    buckets: Iterable[NamedTensors],
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``destination`` from weights and from the other files of ``source``.

    Args:
        buckets: each becomes one file; empty buckets are left out.
        source: Hugging Face folder whose configuration, tokenizer and chat template are copied.
        destination: an existing folder of this name is replaced.
        dtype: dtype of the weights; None keeps that of the tensors.

    Raises:
        OSError: the disk is full, for instance; what was there before stays. A full disk is told
            with the name ``destination``.
    """
    with naming_full_disk(Path(destination)), atomic_folder(Path(destination)) as folder:
        written = _write_weights(buckets, folder, dtype)
        for path in sorted(Path(source).iterdir()):
            if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(path, folder / path.name)
        _set_config_dtype(folder / "config.json", written)


def _write_weights(
    buckets: Iterable[NamedTensors], folder: Path, dtype: torch.dtype | None
) -> torch.dtype | None:
    """Write the safetensors files and their index; returns the weights' dtype."""
    files: list[tuple[Path, list[str]]] = []
    total_size = 0
    for bucket in buckets:
        if not bucket:
            continue
        tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in bucket}
        path = folder / f"part-{len(files):05d}.safetensors"
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise _as_system_error(error, path) from error
        path.chmod(0o644)  # engines may run as another user
        files.append((path, list(tensors)))
        total_size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        dtype = next(iter(tensors.values())).dtype
    if len(files) == 1:
        files[0][0].rename(folder / "model.safetensors")
        return dtype
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return dtype


def _as_system_error(error: SafetensorError, path: Path) -> OSError:
    """What the system said: safetensors 0.8.0 puts it, and no file's name, into its own text."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None:
        return OSError(f"{path} could not be written: {error}")
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))


def _set_config_dtype(path: Path, dtype: torch.dtype | None) -> None:
    config = json.loads(path.read_text())
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    if dtype is not None:
        config[name] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")
