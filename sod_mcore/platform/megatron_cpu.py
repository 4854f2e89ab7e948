"""Let Megatron-Core 0.19.2 run on CPU tensors with gloo, where there is no CUDA device.

Megatron-Core has no switch for this: it names ``torch.cuda.current_device()``, ``device="cuda"``
and ``tensor.cuda()`` in many places. ``torch.cuda`` itself is left alone; in each ``megatron.core``
module the global ``torch`` is rebound to a stand-in whose ``cuda`` and whose tensor factories know
only the CPU. :mod:`sod_mcore.platform.megatron` applies what is listed here, and only on machines
without CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

CPU = torch.device("cpu")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for every call that only orders work on a CUDA stream."""


class _Stream:
    """A CUDA stream or event: on the CPU everything is in order already."""

    cuda_stream = 0
    wait_stream = wait_event = record = synchronize = wait = _nothing

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return event or _Stream()

    def elapsed_time(self, other: _Stream) -> float:
        return 0.0


class _Cuda:
    """What ``torch.cuda`` offers to ``megatron.core`` on a machine without CUDA."""

    Stream = Event = _Stream
    default_stream = current_stream = staticmethod(lambda device=None: _Stream())
    stream = staticmethod(lambda stream: contextlib.nullcontext())
    synchronize = empty_cache = set_device = reset_peak_memory_stats = staticmethod(_nothing)
    is_current_stream_capturing = staticmethod(lambda: False)
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    current_device = staticmethod(lambda: CPU)  # megatron.core only passes it on as ``device=``
    nvtx = SimpleNamespace(range_push=_nothing, range_pop=_nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)  # is_available, FloatTensor, amp, ...: the truth


def _names_cuda(device: object) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return wrapper


class _Torch(ModuleType):
    """What ``megatron.core`` modules see as ``torch``."""

    cuda = _Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return torch.autocast("cpu" if _names_cuda(device_type) else device_type, *args, **kwargs)


_FACTORIES = (
    "arange as_tensor empty empty_like eye full ones ones_like rand randn tensor zeros zeros_like"
)
for _name in _FACTORIES.split():
    setattr(_Torch, _name, staticmethod(_on_cpu(getattr(torch, _name))))

_TORCH = _Torch("torch")


def rebind_torch(module: ModuleType) -> None:
    """Give a ``megatron.core`` module the stand-in for ``torch``."""
    if module.__dict__.get("torch") is torch:
        module.torch = _TORCH  # type: ignore[attr-defined]


GPU_PACKAGES = (
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "fused_weight_gradient_mlp_cuda",
)
"""What Megatron-Core takes layers, optimizers and kernels from wherever it can be imported; all of
it computes on CUDA only. The last two are Apex's compiled modules."""


def hide_gpu_packages() -> None:
    """Let imports of these packages fail as if they were not installed.

    A node without a GPU often has them all the same, in the container that serves the others, and
    Megatron would build an optimizer that fails in its first step.
    """
    imported = [name for name in sys.modules if name.partition(".")[0] in GPU_PACKAGES]
    for name in (*GPU_PACKAGES, *imported):
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to block an import


def make_cuda_method_a_no_op() -> None:
    """``tensor.cuda()`` leaves the tensor where it is: without CUDA it could only raise."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


@contextlib.contextmanager
def _tensors_claim_cuda() -> Iterator[None]:
    real = torch.Tensor.type

    def claimed(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = claimed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = real  # type: ignore[method-assign]


def _claim_cuda_inside(owner: Any, name: str) -> None:
    """Inside ``owner.name``, ``tensor.type()`` says ``torch.cuda.FloatTensor`` (and so on)."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _tensors_claim_cuda():
            return function(*args, **kwargs)

    setattr(owner, name, wrapper)


def _use_default_generator(module: ModuleType) -> None:
    """The "device" generator is the CPU's default one."""

    def get_state(device: str = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    module._get_cuda_rng_state = get_state  # type: ignore[attr-defined]
    module._set_cuda_rng_state = set_state  # type: ignore[attr-defined]


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    # torch.compile would build C++ at the first step for fusions that gain nothing on a CPU.
    "megatron.core.jit": lambda module: module.disable_jit_fuser(),
    "megatron.core.tensor_parallel.random": _use_default_generator,
    # These three compare ``param.type()`` with the names of CUDA tensor types.
    "megatron.core.optimizer.optimizer": lambda module: _claim_cuda_inside(
        module.Float16OptimizerWithFloat16Params, "__init__"
    ),
    "megatron.core.optimizer.distrib_optimizer": lambda module: _claim_cuda_inside(
        module.DistributedOptimizer, "__init__"
    ),
    "megatron.core.optimizer.clip_grads": lambda module: _claim_cuda_inside(
        module, "clip_grad_by_total_norm_fp32"
    ),
}

IMPORTS_TRITON = frozenset({"megatron.core.transformer.moe.ops.paged_stash"})
"""Modules that import triton (1 GB installed) without a guard, though dense models never use it."""


class _Triton(ModuleType):
    """Enough of triton to decorate kernels that are never launched."""

    __path__: list[str] = []  # noqa: RUF012 - an attribute of modules, not of a class

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: args[0] if args else lambda function: function


@contextlib.contextmanager
def triton_stub() -> Iterator[None]:
    """While active, ``import triton`` succeeds even where triton is not installed."""
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    names = ("triton", "triton.language")
    for name in names:
        sys.modules[name] = _Triton(name)
    sys.modules["triton"].language = sys.modules["triton.language"]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
