"""Stand-ins for packages that compute on CUDA only: Transformer Engine and Apex, in eager torch.

They have the names that Megatron-Core 0.19.2 imports, the signatures by which it calls them, and
the parameters, ``_extra_state`` entries and optimizer states of the originals, at tensor-parallel
size 1. They are not the originals: what they show is that the right classes are asked for the right
things, and that names and shapes fit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

TRANSFORMER_ENGINE_VERSION = "2.9.0"


def install_transformer_engine() -> None:
    """Make ``import transformer_engine`` and what Megatron takes from it succeed."""
    base = "transformer_engine"
    add_module(base, __version__=TRANSFORMER_ENGINE_VERSION)
    add_module(f"{base}.common")
    add_module(f"{base}.common.recipe", DelayedScaling=type("DelayedScaling", (), {}))
    add_module(
        f"{base}.pytorch",
        Linear=Linear,
        LayerNormLinear=LayerNormLinear,
        RMSNorm=RMSNorm,
        LayerNorm=type("LayerNorm", (RMSNorm,), {}),
        DotProductAttention=DotProductAttention,
        GroupedLinear=type("GroupedLinear", (torch.nn.Module,), {}),
    )
    add_module(
        f"{base}.pytorch.fp8",
        FP8GlobalStateManager=type("FP8GlobalStateManager", (), {}),
        fp8_autocast=None,
        fp8_model_init=None,
    )
    add_module(
        f"{base}.pytorch.distributed",
        CudaRNGStatesTracker=type("CudaRNGStatesTracker", (), {}),
        activation_recompute_forward=None,
        checkpoint=None,
    )
    add_module(f"{base}.pytorch.module")
    add_module(f"{base}.pytorch.module.base", get_dummy_wgrad=get_dummy_wgrad)
    add_module(
        f"{base}.pytorch.tensor", QuantizedTensor=type("QuantizedTensor", (torch.Tensor,), {})
    )
    add_module(f"{base}.pytorch.attention")
    add_module(f"{base}.pytorch.attention.rope", apply_rotary_pos_emb=None)
    add_module(
        f"{base}.pytorch.router",
        fused_compute_score_for_moe_aux_loss=None,
        fused_moe_aux_loss=None,
        fused_topk_with_score_function=None,
    )
    add_module(
        f"{base}.pytorch.optimizers",
        FusedAdam=fused_adam(f"{base}.pytorch.optimizers"),
        FusedSGD=torch.optim.SGD,
        multi_tensor_applier=multi_tensor_applier,
        multi_tensor_scale=multi_tensor_scale,
        multi_tensor_scale_tensor=multi_tensor_scale,
        multi_tensor_l2norm=multi_tensor_l2norm,
    )


def install_apex() -> None:
    """Make ``import apex`` and ``import amp_C`` succeed."""
    add_module("apex")
    add_module("apex.optimizers", FusedAdam=fused_adam("apex.optimizers"), FusedSGD=torch.optim.SGD)
    add_module("apex.multi_tensor_apply", multi_tensor_applier=multi_tensor_applier)
    add_module(
        "amp_C", multi_tensor_scale=multi_tensor_scale, multi_tensor_l2norm=multi_tensor_l2norm
    )


def install_weight_gradient_kernels() -> list[torch.Size]:
    """Make ``import fused_weight_gradient_mlp_cuda`` succeed.

    Returns:
        filled with the shape of each weight whose gradient the kernel has accumulated.
    """
    calls: list[torch.Size] = []

    def accumulate(inputs: torch.Tensor, grad_output: torch.Tensor, buffer: torch.Tensor) -> None:
        calls.append(buffer.shape)
        buffer.add_(grad_output.t().to(buffer.dtype) @ inputs.to(buffer.dtype))

    add_module("fused_weight_gradient_mlp_cuda", wgrad_gemm_accum_fp32=accumulate)
    return calls


def add_module(name: str, **attributes: Any) -> None:
    """Put a module into ``sys.modules`` and into its parent."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


class _WithExtraState(torch.nn.Module):
    """Modules of Transformer Engine store FP8 scales beside their parameters: empty without FP8."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0, state


class Linear(_WithExtraState):
    """``transformer_engine.pytorch.Linear``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        tp_size: int,
        parallel_mode: str | None,
        **unused: Any,
    ) -> None:
        super().__init__()
        assert tp_size == 1, "the stand-in is for one rank"
        assert not return_bias
        self.parallel_mode = parallel_mode
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        weight = torch.zeros(out_features, in_features, dtype=params_dtype)
        self.weight = torch.nn.Parameter(weight)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype))

    def forward(self, inputs: torch.Tensor, is_first_microbatch: bool | None) -> torch.Tensor:
        return F.linear(inputs, self.weight, self.bias if self.use_bias else None)


class LayerNormLinear(Linear):
    """``transformer_engine.pytorch.LayerNormLinear``: holds the norm's scale as well."""

    def __init__(
        self, in_features: int, out_features: int, *, eps: float, normalization: str, **others: Any
    ) -> None:
        assert normalization == "RMSNorm"
        super().__init__(in_features, out_features, **others)
        self.eps = eps
        scale = torch.ones(in_features, dtype=others["params_dtype"])
        self.layer_norm_weight = torch.nn.Parameter(scale)

    def forward(self, inputs: torch.Tensor, is_first_microbatch: bool | None) -> torch.Tensor:
        scale = self.layer_norm_weight
        normalised = F.rms_norm(inputs, scale.shape, scale, self.eps)
        return super().forward(normalised, is_first_microbatch)


class RMSNorm(_WithExtraState):
    """``transformer_engine.pytorch.RMSNorm``."""

    def __init__(
        self, normalized_shape: int, eps: float, params_dtype: torch.dtype, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(inputs, self.weight.shape, self.weight, self.eps)


class DotProductAttention(_WithExtraState):
    """``transformer_engine.pytorch.DotProductAttention``, one sequence at a time."""

    def __init__(self, *, softmax_scale: float | None, **unused: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        # As the original: checkpoints without this entry can be loaded.
        self.register_load_state_dict_post_hook(_forgive_extra_state)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: str,
        qkv_format: str = "sbhd",
        cu_seqlens_q: torch.Tensor | None = None,
        **packed: Any,
    ) -> torch.Tensor:
        assert attention_mask is None
        if qkv_format == "sbhd":  # [s, b, heads, d] -> [s, b, heads * d]
            assert attn_mask_type == "causal"
            rows = [
                self._attend(*(tensor[:, row] for tensor in (query, key, value)))
                for row in range(query.shape[1])
            ]
            return torch.stack(rows, dim=1).flatten(2)
        assert attn_mask_type == "padding_causal"
        assert cu_seqlens_q is not None
        bounds = cu_seqlens_q.tolist()
        sequences = [
            self._attend(*(tensor[start:stop] for tensor in (query, key, value)))
            for start, stop in pairwise(bounds)
        ]
        return torch.cat(sequences).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``[s, heads, d]`` each -> ``[s, heads, d]``."""
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        scale = self.softmax_scale or query.shape[-1] ** -0.5
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).float().softmax(-1).to(value.dtype)
        return torch.einsum("hqk,khd->qhd", weights, value)


def _forgive_extra_state(module: torch.nn.Module, incompatible: Any) -> None:
    for key in [key for key in incompatible.missing_keys if key.endswith("_extra_state")]:
        if "core_attention" in key:
            incompatible.missing_keys.remove(key)


def fused_adam(module: str) -> type[torch.optim.Optimizer]:
    """A class like the fused Adams: steps are counted by parameter group, not by parameter."""

    class FusedAdam(torch.optim.Optimizer):
        def __init__(
            self,
            params: Any,
            lr: float,
            betas: tuple[float, float],
            eps: float,
            weight_decay: float,
            *,
            adam_w_mode: bool,
            capturable: bool,
        ) -> None:
            assert adam_w_mode
            assert not capturable
            defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
            super().__init__(params, {**defaults, "bias_correction": True})

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, parameter.grad, group)

        def _update(
            self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
        ) -> None:
            state = self.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                state.setdefault(key, torch.zeros_like(parameter))
            beta1, beta2 = group["betas"]
            state["exp_avg"].lerp_(gradient, 1 - beta1)
            state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
            mean = state["exp_avg"] / (1 - beta1 ** group["step"])
            square = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))

    FusedAdam.__module__ = module
    return FusedAdam


def get_dummy_wgrad(shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """A gradient whose values nobody may read, unless ``zero``."""
    return torch.full(tuple(shape), 0.0 if zero else float("nan"), dtype=dtype)


def multi_tensor_applier(
    operation: Callable[..., Any], flag: torch.Tensor, tensors: Any, *arguments: Any
) -> Any:
    """``apex.multi_tensor_apply.multi_tensor_applier``."""
    return operation(2048 * 32, flag, tensors, *arguments)


def multi_tensor_scale(
    chunk_size: int, flag: torch.Tensor, tensors: Sequence[Sequence[torch.Tensor]], scale: Any
) -> None:
    """Write ``tensors[0] * scale`` to ``tensors[1]``."""
    for source, destination in zip(*tensors, strict=True):
        destination.copy_(source * scale)


def multi_tensor_l2norm(
    chunk_size: int, flag: torch.Tensor, tensors: Sequence[Sequence[torch.Tensor]], *unused: Any
) -> tuple[torch.Tensor, None]:
    """The norm of all of ``tensors[0]``."""
    norms = [tensor.float().norm() for tensor in tensors[0]]
    return torch.stack(norms).norm().reshape(1), None
