"""The one place that imports the compiled extension and decides on which devices it is used.

Where it cannot be used, the operations run in eager torch: with the same results, but slowly and
with several copies of the logits in memory. That is never silent: it is warned of once, with the
reason and the mend. The environment variable SOD_OPS decides:

    auto   (default) the extension where it can run, else eager torch
    eager  never the extension
    fused  always the extension; where it cannot run, an error
"""

import ctypes
import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

MODULE = "sod_mcore.ops._C"
CHOICES = ("auto", "eager", "fused")
INSTALL_AGAIN = "install the package again (make setup, or pip install .)"


def extension_for(device: torch.device) -> ModuleType | None:
    """The extension if it is to be used for tensors on this device, else None for eager torch.

    Raises:
        ValueError: if SOD_OPS has another value than those above.
        RuntimeError: if SOD_OPS=fused and the extension cannot run on the device.
    """
    choice = requested_choice()
    if choice == "eager":
        return None
    reason = missing_reason(device)
    if reason is None:
        return load_extension()
    if choice == "fused":
        raise RuntimeError(f"SOD_OPS=fused, but {reason}. Or set SOD_OPS=auto for eager torch")
    warn_once(
        f"operations on logits run in eager torch on {device.type}, slowly and with several "
        f"copies of the logits in memory: {reason}. Or set SOD_OPS=eager to accept that"
    )
    return None


def requested_choice() -> str:
    """What SOD_OPS asks for; ValueError if that is none of the choices."""
    choice = os.environ.get("SOD_OPS") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"SOD_OPS={choice} must be one of {', '.join(CHOICES)}")
    return choice


def load_extension() -> ModuleType | None:
    """The compiled module, or None if it is not built or cannot be loaded."""
    return _import()[0]


@functools.cache
def missing_reason(device: torch.device) -> str | None:
    """Why the extension cannot run on this device, with the mend; None if it can."""
    extension, import_fault = _import()
    if extension is None:
        return import_fault
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"the extension has no kernels for {device.type}; use cpu or cuda"
    if not extension.with_cuda:
        return (
            f"the extension has no CUDA kernels ({extension.cuda_missing_reason}); with nvcc on "
            f"the PATH and SOD_CUDA=1 set, {INSTALL_AGAIN}"
        )
    return _gpu_fault(extension, torch.cuda.get_device_capability(device), _driver_version())


@functools.cache
def warn_once(message: str) -> None:
    """Warn, but of each thing once in a process."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for e.g. "80,90" run on a GPU of this compute capability.

    Machine code runs within its major version from its minor version on; from the PTX of the newest
    architecture the driver makes code for anything later.
    """
    built = [divmod(int(number), 10) for number in architectures.split(",")]
    return capability >= max(built) or any(
        major == capability[0] and minor <= capability[1] for major, minor in built
    )


@functools.cache
def _import() -> tuple[ModuleType | None, str]:
    """The module, and where there is none the reason with the mend."""
    try:
        return importlib.import_module(MODULE), ""
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == MODULE:
            return None, (
                f"the extension {MODULE} is not built for this Python; with a C++ compiler and "
                "Python's headers (Debian: apt-get install -y build-essential python3-dev) "
                f"{INSTALL_AGAIN}"
            )
        return None, f"the extension {MODULE} cannot be loaded ({error}); {INSTALL_AGAIN}"


def _gpu_fault(extension: ModuleType, capability: tuple[int, int], driver: int) -> str | None:
    """What keeps the CUDA kernels from running on a GPU, with the mend."""
    if not covers(extension.cuda_architectures, capability):
        number = "{}{}".format(*capability)
        return (
            f"the extension has CUDA kernels for {extension.cuda_architectures} and the GPU is "
            f"{number}; with SOD_CUDA_ARCHITECTURES={number} set, {INSTALL_AGAIN}"
        )
    # Within a major version any driver runs what any toolkit made.
    if int(extension.cuda_version.split(".")[0]) > driver:
        return (
            f"the extension was compiled by CUDA {extension.cuda_version} and the driver is for "
            f"CUDA {driver}; with SOD_NVCC set to an nvcc of CUDA {driver}, {INSTALL_AGAIN}"
        )
    return None


def _driver_version() -> int:
    """Major version of CUDA that the driver is for; torch has no public name for it."""
    version = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
        raise RuntimeError("cuDriverGetVersion failed: is the NVIDIA driver loaded? Try nvidia-smi")
    return version.value // 1000
