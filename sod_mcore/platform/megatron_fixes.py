"""Corrections of megatron-core 0.19.2 that every device needs, each with its reason.

:mod:`sod_mcore.platform.megatron` applies them as the named modules are imported, and refuses other
versions of megatron-core, so that a correction never meets code that it was not written for.
"""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


def fix_distributed_optimizer(module: ModuleType) -> None:
    """0.19.2, DistributedOptimizer around torch's AdamW (hosts without TransformerEngine or Apex).

    Loading a checkpoint fails or corrupts the state:
    ``_set_main_param_and_optimizer_states`` reads ``tensors["step"]``, which no checkpoint has, and
    copies into leaf tensors outside ``no_grad``; ``load_state_dict`` hands one shared ``step``
    tensor to all parameters, so that each parameter's update counts it up and Adam's bias
    correction is silently wrong from the second update after a resume.
    """
    optimizer = module.DistributedOptimizer
    set_states = optimizer._set_main_param_and_optimizer_states
    load_state_dict = optimizer.load_state_dict

    @functools.wraps(set_states)
    def set_states_without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        with torch.no_grad():
            set_states(self, model_param, {"step": None, **tensors})  # None is skipped

    @functools.wraps(load_state_dict)
    def load_and_unshare_step(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    optimizer._set_main_param_and_optimizer_states = set_states_without_step
    optimizer.load_state_dict = load_and_unshare_step


def vectorize_packed_rope(module: ModuleType) -> None:
    """0.19.2, rotary embedding of packed rows without TransformerEngine.

    The stock function copies ``cu_seqlens`` to the host and loops over the sequences in Python,
    about ten kernels each, for queries and keys of every layer; a micro-batch of many short
    sequences spends more time there than in its matrix products. One gather gives the same numbers.
    Rows split by context parallelism keep the stock function.
    """
    stock = module._apply_rotary_pos_emb_thd

    @functools.wraps(stock)
    def apply(
        t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        cp_group = kwargs.get("cp_group")
        if args or cp_group is None or cp_group.size() > 1:
            return stock(t, cu_seqlens, freqs, *args, **kwargs)
        total = t.shape[0]
        starts = torch.repeat_interleave(
            cu_seqlens[:-1], cu_seqlens.diff(), output_size=total
        )  # [total]
        positions = torch.arange(total, device=t.device) - starts
        del kwargs["cp_group"]
        return module._apply_rotary_pos_emb_bshd(
            t.unsqueeze(1), freqs[positions], **kwargs
        ).squeeze(1)

    module._apply_rotary_pos_emb_thd = apply  # type: ignore[attr-defined]


def write_checkpoints_without_a_process(module: ModuleType) -> None:
    """0.19.2, the queue through which checkpoint writers return their results.

    The stock one lives in a manager process: at the first save each rank starts an interpreter
    that imports all of torch (seconds, and about 450 MB), and that stays behind for ever when the
    rank is killed. Our saves are synchronous: the writers are this process and its threads, for
    which a plain queue is enough.
    """
    results: queue.Queue[Any] = queue.Queue()
    module._results_queue = results  # type: ignore[attr-defined]


def name_pickled_storages_as_torch_does(module: ModuleType) -> None:
    """0.19.2 puts ``safe_load_from_bytes`` in the place of ``torch.storage._load_from_bytes``.

    Every tensor that is pickled afterwards names Megatron's function, which a process without
    Megatron cannot load: SGLang's refuses it and ends. The function stays; it gets the name of the
    one whose place it takes, so that a pickle reads the same with Megatron imported and without.
    """
    function = module.safe_load_from_bytes
    function.__module__, function.__qualname__ = "torch.storage", "_load_from_bytes"


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.optimizer.distrib_optimizer": fix_distributed_optimizer,
    "megatron.core.models.common.embeddings.rope_utils": vectorize_packed_rope,
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (
        write_checkpoints_without_a_process
    ),
    "megatron.core.safe_globals": name_pickled_storages_as_torch_does,
}
