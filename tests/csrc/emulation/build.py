"""Builds csrc/ as a module whose CUDA kernels are emulated on the CPU by cuda_emulation.h."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).parents[3]
FLAGS = [
    "-O1",
    "-g",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",  # CUDA allows reading numbers as vectors
    "-pthread",
    "-fvisibility=hidden",
    "-DSOD_WITH_CUDA",
    # pybind11 knows classes by name, and the package's own module may be in the same process.
    "-Dsod_mcore=emulated_mcore",
    f"-I{REPOSITORY / 'csrc'}",
    f"-I{Path(__file__).parent}",
]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def build_common_objects(folder: Path) -> list[Path]:
    """The parts that no sanitizer looks into: the bindings and the CPU kernels."""
    command = [sys.executable, "-m", "pybind11", "--includes"]
    includes = _run(command).split()
    return [
        _compile(folder / "bindings.o", "csrc/bindings.cpp", ["-std=c++17", "-O0", *includes]),
        _compile(folder / "cpu_kernels.o", "csrc/cpu_kernels.cpp", ["-std=c++17"]),
    ]


def build_module(
    folder: Path,
    common: list[Path],
    sanitizer: str | None = None,
    *,
    has_small_blocks: bool = True,
) -> Path:
    """The module, in a subfolder of its own; a sanitizer, if named, is in its CUDA kernels.

    Args:
        has_small_blocks: blocks of fewer threads than on a GPU, for which each is one of the
            operating system.
    """
    blocks = "small" if has_small_blocks else "full"
    target = folder / f"{sanitizer or 'plain'}_{blocks}" / "_C.so"
    target.parent.mkdir()
    flags = [] if sanitizer is None else SANITIZERS[sanitizer]
    if has_small_blocks:
        flags = [*flags, "-DSOD_SMALL_BLOCKS"]
    kernels = _compile(
        target.with_name("cuda_kernels.o"),
        "csrc/cuda_kernels.cu",
        ["-std=c++20", *flags, "-x", "c++"],
    )
    _run(["g++", "-shared", "-pthread", *flags, *map(str, [*common, kernels]), "-o", str(target)])
    return target


def load_module(path: Path) -> ModuleType:
    """Import what :func:`build_module` made."""
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_time_library(sanitizer: str) -> str:
    """Path of what a process has to preload before it loads a module with that sanitizer."""
    name = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    return _run(["g++", f"-print-file-name={name}"]).strip()


def _compile(target: Path, source: str, flags: list[str]) -> Path:
    _run(["g++", *FLAGS, *flags, "-c", str(REPOSITORY / source), "-o", str(target)])
    return target


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
