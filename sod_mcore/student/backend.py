"""Which implementation of layers, Adam and gradient accumulation the student is built from.

Megatron-Core looks for Transformer Engine, Apex and Apex's ``fused_weight_gradient_mlp_cuda`` once,
while it is imported, and its classes are defined by what it found (without CUDA,
``sod_mcore.platform`` hides them from it). This module asks Megatron what it found, so the two
cannot disagree; everything else that depends on the choice asks this module.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from typing import Literal

import megatron.core.optimizer as megatron_optimizer
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import layers as parallel_layers

from sod_mcore.config import ConfigError, StudentConfig

LayerImplementation = Literal["transformer_engine", "local"]
AdamImplementation = Literal["transformer_engine", "apex", "torch"]

TRANSFORMER_ENGINE = "transformer_engine"
WEIGHT_GRADIENT_KERNELS = "fused_weight_gradient_mlp_cuda"


@dataclass(frozen=True)
class Backend:
    """What the student is built from.

    Attributes:
        layers: whose layer specification; Megatron's ``transformer_impl``.
        adam: whose Adam Megatron's optimizer is built around.
        gradient_accumulation_fusion: weight gradients are added to the gradient buffer by the
            matrix product that computes them.
        reason: why ``layers`` is not Transformer Engine; empty if it is.
        fusion_reason: why gradient accumulation is not fused; empty if it is.
    """

    layers: LayerImplementation
    adam: AdamImplementation
    gradient_accumulation_fusion: bool
    reason: str
    fusion_reason: str

    def describe(self) -> str:
        """One line for the start of a run."""
        layers = "Transformer Engine" if not self.reason else f"Megatron's local ({self.reason})"
        adam = {"transformer_engine": "Transformer Engine's", "apex": "Apex's", "torch": "torch's"}
        fusion = "fused" if not self.fusion_reason else f"not fused ({self.fusion_reason})"
        return f"layers: {layers}; Adam: {adam[self.adam]}; gradient accumulation: {fusion}"


def choose_backend(student: StudentConfig) -> Backend:
    """What this machine and the configuration make of the student.

    Raises:
        ConfigError: Transformer Engine, or fused gradient accumulation, is asked for where it
            cannot be used.
    """
    reason = _why_local_layers(student)
    if student.transformer_implementation == TRANSFORMER_ENGINE and reason:
        raise ConfigError(
            f"student.transformer_implementation is {TRANSFORMER_ENGINE!r}, but {reason}; mend "
            "that, or set it to auto or local"
        )
    fusion_reason = _why_no_fusion(student)
    if student.megatron.get("gradient_accumulation_fusion") and fusion_reason:
        raise ConfigError(
            "student.megatron.gradient_accumulation_fusion is true, but "
            f"{fusion_reason}; install Apex with its CUDA extensions, or remove it"
        )
    return Backend(
        layers="local" if reason else "transformer_engine",
        adam=adam_implementation(),
        gradient_accumulation_fusion=not fusion_reason,
        reason=reason,
        fusion_reason=fusion_reason,
    )


def adam_implementation() -> AdamImplementation:
    """Whose Adam Megatron found; it takes Transformer Engine's before Apex's before torch's."""
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        return "torch"
    package = megatron_optimizer.Adam.__module__.partition(".")[0]
    return "transformer_engine" if package == TRANSFORMER_ENGINE else "apex"


def _why_local_layers(student: StudentConfig) -> str:
    """Why Transformer Engine's layers are not used; empty if they are."""
    if student.transformer_implementation == "local":
        return "student.transformer_implementation is local"
    if not HAVE_TE:
        return _why_absent(TRANSFORMER_ENGINE, f"{TRANSFORMER_ENGINE}.pytorch")
    if student.precision != "bf16":
        # Its attention has no kernel for packed rows in float32.
        return (
            f"Transformer Engine's attention needs student.precision bf16, not {student.precision}"
        )
    return ""


def _why_no_fusion(student: StudentConfig) -> str:
    """Why weight gradients are not accumulated by fused kernels; empty if they are.

    Transformer Engine's layers bring kernels of their own, but Megatron's output layer, which every
    GPTModel has, needs Apex's.
    """
    if student.megatron.get("gradient_accumulation_fusion") is False:
        return "student.megatron.gradient_accumulation_fusion is false"
    if not parallel_layers._grad_accum_fusion_available:
        return _why_absent(WEIGHT_GRADIENT_KERNELS, WEIGHT_GRADIENT_KERNELS)
    return ""


def _why_absent(package: str, module: str) -> str:
    """Why Megatron did not find a package."""
    if package in sys.modules and sys.modules[package] is None:
        return f"{package} needs a CUDA device and there is none"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"importing {package} fails: {str(error).splitlines()[0]}"
    return f"Megatron-Core does not accept the installed {package}"
