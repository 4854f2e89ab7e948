"""The corrections of megatron-core 0.19.2, against the functions that they replace."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sod_mcore.student  # noqa: F401 - applies the patches
from sod_mcore.platform.megatron_fixes import fix_distributed_optimizer

ONE_RANK: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectorized_rope_equals_the_loop_to_the_bit(dtype: torch.dtype) -> None:
    from megatron.core.models.common.embeddings import rope_utils

    torch.manual_seed(0)
    lengths = [5, 1, 17, 8]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = torch.randn(sum(lengths), 3, 8, dtype=dtype)
    freqs = torch.randn(20, 1, 1, 8)
    ours = rope_utils._apply_rotary_pos_emb_thd(rows, cu_seqlens, freqs, cp_group=ONE_RANK)
    stock = rope_utils._apply_rotary_pos_emb_thd.__wrapped__
    assert stock is not rope_utils._apply_rotary_pos_emb_thd
    assert torch.equal(ours, stock(rows, cu_seqlens, freqs, cp_group=ONE_RANK))


def test_each_parameter_counts_its_own_steps_after_loading() -> None:
    class DistributedOptimizer:
        """The part of the stock class that shares one step tensor."""

        def __init__(self) -> None:
            self.optimizer = SimpleNamespace(state={"a": {}, "b": {}, "c": {"step": 3}})
            self.received: dict[str, Any] = {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            step = torch.tensor(state_dict["step"])
            for name in "ab":
                self.optimizer.state[name] = {"step": step}

        def _set_main_param_and_optimizer_states(
            self, model_param: object, tensors: dict[str, Any]
        ) -> None:
            assert not torch.is_grad_enabled()
            self.received = tensors

    module: Any = SimpleNamespace(DistributedOptimizer=DistributedOptimizer)
    fix_distributed_optimizer(module)
    optimizer = DistributedOptimizer()
    optimizer.load_state_dict({"step": 4.0})
    optimizer.optimizer.state["a"]["step"] += 1
    assert optimizer.optimizer.state["b"]["step"] == 4.0
    assert optimizer.optimizer.state["c"]["step"] == 3
    optimizer._set_main_param_and_optimizer_states(None, {"exp_avg": 1})
    assert optimizer.received == {"step": None, "exp_avg": 1}


def test_a_saved_checkpoint_starts_no_process() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = multiprocessing.active_children()
    filesystem_async.get_write_results_queue().put("result")
    assert filesystem_async.get_write_results_queue().get_nowait() == "result"
    assert multiprocessing.active_children() == before


def test_pickled_tensors_name_nothing_of_megatron() -> None:
    """Another process, SGLang's for instance, loads them without Megatron."""
    program = (
        "import pickle, sys, torch, sod_mcore.student, megatron.core\n"
        "sys.stdout.buffer.write(pickle.dumps(torch.arange(3.0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=120, check=True
    )
    assert b"megatron" not in done.stdout
    assert torch.equal(pickle.loads(done.stdout), torch.arange(3.0))
