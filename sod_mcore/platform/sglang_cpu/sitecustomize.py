"""Lets an unmodified SGLang 0.5.23 run beside the CPU build of torch.

Python imports this module at start when its folder is on PYTHONPATH. It changes nothing until one
of the modules below is imported, and then bridges what exists only with CUDA:

* ``sgl_kernel``: the stand-in beside this file.
* ``torchvision`` 0.28: the wheel on PyPI is a CUDA build whose library does not load, so the two
  operators for which its Python code registers shapes are declared first.
* ``triton``, when it is not installed: SGLang's own stand-in (``sglang/_platform_stubs.py``, made
  for macOS) takes its place; kernels are defined with it, never run.
* attention and sampling, which are slow without a GPU: see ``batched_attention.py`` and
  ``inverse_sampling.py``.
* ``SGLANG_CPU_FORK=1``: SGLang spawns its scheduler and detokenizer, and each imports everything
  again; without a CUDA context to lose, forking them saves that time.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

REPLACED_PARTS = {
    "sglang.srt.layers.attention.torch_native_backend": (
        "batched_attention",
        "TorchNativeAttnBackend",
    ),
    "sglang.srt.layers.sampler": ("inverse_sampling", None),
}
"""By module of SGLang: the file beside this one whose ``install`` replaces a part of it, and the
class that ``install`` is given; None gives it the module."""


class BridgeFinder(importlib.abc.MetaPathFinder):
    """Prepares the ground just before a module is looked for elsewhere."""

    def __init__(self) -> None:
        self._operator_libraries: list[Any] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Called by the import system for each module that is not loaded yet."""
        if fullname == "torchvision._meta_registrations":
            self._operator_libraries.append(_declare_torchvision_operators())
        elif fullname == "sglang":
            _stub_triton()
            if os.environ.get("SGLANG_CPU_FORK") == "1":
                _fork_instead_of_spawn()
        elif fullname in REPLACED_PARTS:
            return _replacing_parts(importlib.machinery.PathFinder.find_spec(fullname, path))
        return None


def _replacing_parts(
    spec: importlib.machinery.ModuleSpec | None,
) -> importlib.machinery.ModuleSpec | None:
    """The module's own specification, with a loader that replaces parts after loading."""
    if spec is None or spec.loader is None:
        return spec
    loader: Any = spec.loader
    execute = loader.exec_module
    replacement, class_name = REPLACED_PARTS[spec.name]

    def execute_and_replace(module: Any) -> None:
        execute(module)
        # The folder of this file is on PYTHONPATH.
        part = module if class_name is None else getattr(module, class_name)
        importlib.import_module(replacement).install(part)

    loader.exec_module = execute_and_replace
    return spec


def _declare_torchvision_operators() -> Any:
    """The declarations live as long as the returned library does."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _stub_triton() -> None:
    if "triton" in sys.modules or importlib.util.find_spec("triton") is not None:
        return
    import torch  # before the stand-in exists, so that torch itself sees no triton
    import torch.mps

    stubs = _load_sglang_stubs()
    # install_platform_stubs() does nothing off macOS and patches torch.mps on it: it sees a Mac for
    # the length of this call, and what it does to torch is undone.
    stubs.sys, stubs.platform = _MacSystem(), _MacPlatform()
    mps: Any = torch.backends.mps
    tensor: Any = torch.Tensor
    is_available, attributes = mps.is_available, dict(vars(torch.mps))
    tensor_to, tensor_copy = tensor.to, tensor.copy_
    mps.is_available = lambda: True
    try:
        stubs.install_platform_stubs()
    finally:
        mps.is_available = is_available
        tensor.to, tensor.copy_ = tensor_to, tensor_copy
        for name in set(vars(torch.mps)) - set(attributes):
            delattr(torch.mps, name)
        vars(torch.mps).update(attributes)


def _load_sglang_stubs() -> Any:
    """Load ``sglang/_platform_stubs.py`` without importing the package around it."""
    package = importlib.machinery.PathFinder.find_spec("sglang")
    if package is None or not package.submodule_search_locations:
        raise ImportError("sglang is not installed in this environment")
    file = Path(package.submodule_search_locations[0]) / "_platform_stubs.py"
    spec = importlib.util.spec_from_file_location("_sglang_stubs", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded; SGLang 0.5.23 has it")
    stubs = importlib.util.module_from_spec(spec)
    sys.modules["_sglang_stubs"] = stubs
    spec.loader.exec_module(stubs)
    return stubs


class _MacSystem:
    """``sys``, as it would be on macOS."""

    platform = "darwin"

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)


class _MacPlatform:
    """``platform``, as it would be on an Apple processor."""

    @staticmethod
    def machine() -> str:
        return "arm64"


def _fork_instead_of_spawn() -> None:
    import multiprocessing

    original = multiprocessing.set_start_method

    def set_start_method(method: str | None, force: bool = False) -> None:
        original("fork" if method == "spawn" else method, force=force)

    module: Any = multiprocessing
    module.set_start_method = set_start_method


sys.meta_path.insert(0, BridgeFinder())
