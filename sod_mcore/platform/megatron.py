"""Prepare Megatron-Core for this machine: the one call that must precede its first import.

Patches are applied to each ``megatron.core`` module right after the module has been executed, so
nothing is imported earlier than the program needs it and ``from x import y`` never sees an
unpatched ``y``. The patches themselves are in :mod:`megatron_fixes` (every device) and
:mod:`megatron_cpu` (machines without CUDA).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch

from sod_mcore.platform import megatron_cpu, megatron_fixes

Patch = Callable[[ModuleType], None]

SUPPORTED_VERSION = "0.19.2"
PACKAGE = "megatron.core"


def prepare_megatron(*, hide_gpu_packages: bool | None = None) -> None:
    """Install the patches for this machine; calling it again does nothing.

    Args:
        hide_gpu_packages: Megatron does not find Transformer Engine and Apex; by default so where
            there is no CUDA. Tests that put stand-ins in their place show them to Megatron.

    Raises:
        RuntimeError: megatron-core is missing, has another version, or was imported already.
    """
    if any(isinstance(finder, PatchingFinder) for finder in sys.meta_path):
        return
    _check_version()
    if PACKAGE in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before sod_mcore.student; import sod_mcore.student first"
        )
    _quiet()
    if hide_gpu_packages or (hide_gpu_packages is None and not torch.cuda.is_available()):
        megatron_cpu.hide_gpu_packages()
    patches: dict[str, list[Patch]] = {
        name: [patch] for name, patch in megatron_fixes.PATCHES.items()
    }
    if torch.cuda.is_available():
        sys.meta_path.insert(0, PatchingFinder(patches))
        return
    for name, patch in megatron_cpu.PATCHES.items():
        patches.setdefault(name, []).insert(0, patch)
    megatron_cpu.make_cuda_method_a_no_op()
    sys.meta_path.insert(
        0,
        PatchingFinder(
            patches,
            for_every_module=megatron_cpu.rebind_torch,
            around=dict.fromkeys(megatron_cpu.IMPORTS_TRITON, megatron_cpu.triton_stub),
        ),
    )


def _quiet() -> None:
    """Hide what 0.19.2 prints on every start without Transformer Engine and Apex: dozens of lines
    about fallbacks, which are this project's choice (see the local layer specification); and what
    torch says about the way in which it reads checkpoints."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def _check_version() -> None:
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(
            "megatron-core is not installed; run: pip install --no-deps "
            f"--ignore-requires-python megatron-core=={SUPPORTED_VERSION}"
        ) from error
    if version != SUPPORTED_VERSION:
        raise RuntimeError(
            f"megatron-core is {version}, but the corrections in sod_mcore/platform are for "
            f"{SUPPORTED_VERSION}; install that version"
        )


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds ``megatron.core`` modules as Python does, and patches each after its execution.

    Args:
        patches: module name -> patches, applied in order.
        for_every_module: applied to each module before its own patches.
        around: module name -> context manager that is active while the module executes.
    """

    def __init__(
        self,
        patches: Mapping[str, Sequence[Patch]],
        for_every_module: Patch | None = None,
        around: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
    ) -> None:
        self.patches = patches
        self.for_every_module = for_every_module
        self.around = around or {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's spec with a loader that also patches; None for other packages."""
        if not name.startswith(PACKAGE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            with self.around.get(name, nullcontext)():
                execute(module)
            if self.for_every_module is not None:
                self.for_every_module(module)
            for patch in self.patches.get(name, ()):
                patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec
