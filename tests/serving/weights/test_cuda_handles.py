"""Handles of CUDA memory, on a CPU: how many are made, for whom, and what SGLang reads from them.

What torch itself does with a GPU is looked at by ``gpu_check.py``.
"""

from __future__ import annotations

import base64
import inspect
import subprocess
import types
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import reductions

from sod_mcore.config import EngineConfig
from sod_mcore.serving.fleet.launch import EnginePlace, engine_environment
from sod_mcore.serving.weights.cuda_handles import (
    DEVICE_ARGUMENT,
    ByCudaHandle,
    Reduced,
    handle_of,
)
from sod_mcore.serving.weights.tensor_transfer import TensorTransfer
from sod_mcore.serving.weights.transfer import WeightUpdateError
from sod_mcore.serving.weights.update import update_weights, weight_versions
from tests.serving.conftest import sglang_python
from tests.serving.scripted_engines import ScriptedEngines, running_engines
from tests.serving.small_weights import EMBEDDING, NORM, new_buckets, write_folder

CPU = torch.device("cpu")
TIMEOUT = 60.0
UUIDS = ("4ef9d8a0-0000", "0b7c2a11-1111")

SGLANG_READS = """
import base64, sys, types
import torch
from torch.multiprocessing import reductions
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

def rebuild(*arguments):
    print("read:", arguments[:4], arguments[5:])
    return torch.zeros(1)

uuids = sys.argv[2:]
torch.cuda.device_count = lambda: len(uuids)
torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(uuid=uuids[index])
reductions.rebuild_cuda_tensor = rebuild
monkey_patch_torch_reductions()
named_tensors = MultiprocessingSerializer.deserialize(base64.b64decode(sys.argv[1]))
print("read:", [(name, type(tensor).__name__) for name, tensor in named_tensors])
"""


def values_of(tensor: torch.Tensor) -> Reduced:
    """Stands for a handle: scripted engines can read it."""
    return torch.tensor, (tensor.tolist(),)


def cuda_reduction(tensor: torch.Tensor) -> Reduced:
    """What torch answers for a CUDA tensor on GPU 3, with invented handles."""
    of_storage = (3, b"handle", 24, 512, False, b"/torch_1_2", 64, b"event", True)
    return reductions.rebuild_cuda_tensor, (
        *(type(tensor), tensor.size(), tensor.stride(), tensor.storage_offset()),
        *(torch.storage.TypedStorage, tensor.dtype, *of_storage),
    )


def test_a_handle_names_the_gpu_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert parameters[DEVICE_ARGUMENT] == "storage_device"
    monkeypatch.setattr(reductions, "reduce_tensor", cuda_reduction)
    properties = types.SimpleNamespace(uuid=UUIDS[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    tensor = torch.ones(2, 3)
    rebuild, arguments = handle_of(tensor)
    expected = dict(zip(parameters, cuda_reduction(tensor)[1], strict=True))
    assert rebuild is reductions.rebuild_cuda_tensor
    assert dict(zip(parameters, arguments, strict=True)) == expected | {"storage_device": UUIDS[1]}


def test_sglang_reads_them() -> None:
    def reduce(tensor: torch.Tensor) -> Reduced:
        rebuild, arguments = cuda_reduction(tensor)
        return rebuild, (*arguments[:DEVICE_ARGUMENT], UUIDS[1], *arguments[DEVICE_ARGUMENT + 1 :])

    bucket = [(NORM, torch.ones(2, 3, dtype=torch.bfloat16))]
    (payload,) = ByCudaHandle(CPU, reduce, lambda: None).payloads(bucket, 1)
    environment = engine_environment(EngineConfig(model_path=""), EnginePlace("student", 0, "cpu"))
    result = subprocess.run(
        [sglang_python(), "-c", SGLANG_READS, base64.b64encode(payload).decode(), *UUIDS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("read:")] == [
        "read: (<class 'torch.Tensor'>, torch.Size([2, 3]), (3, 1), 0) "
        "(torch.bfloat16, 1, b'handle', 24, 512, False, b'/torch_1_2', 64, b'event', True)",
        f"read: [('{NORM}', 'Tensor')]",
    ]


def test_every_rank_of_every_engine_gets_handles_of_its_own(tmp_path: Path) -> None:
    made: Counter[int] = Counter()

    def reduce(tensor: torch.Tensor) -> Reduced:
        made[tensor.numel()] += 1
        return values_of(tensor)

    engines = ScriptedEngines(write_folder(tmp_path, tied=True), tensor_parallel_sizes=(3, 1))
    with running_engines(engines):
        transfer = TensorTransfer(new_buckets(), ByCudaHandle(CPU, reduce, lambda: None))
        update_weights(engines.endpoints, "student", transfer, 5, TIMEOUT)
        assert weight_versions(engines.endpoints, "student", TIMEOUT) == (5, 5)
    assert made == {15: 4, 3: 4}
    for received, ranks in zip(engines.received, (3, 1), strict=True):
        for request, sent in zip(received, [*new_buckets(), []], strict=True):
            assert len(request.tensors) == ranks
            for tensors in request.tensors:
                assert [name for name, _ in tensors] == [name for name, _ in sent]
                pairs = zip(tensors, sent, strict=True)
                assert all(torch.equal(found, tensor) for (_, found), (_, tensor) in pairs)


@pytest.mark.parametrize("refusing", [None, 1])
def test_a_copy_lives_until_its_readers_have_answered(tmp_path: Path, refusing: int | None) -> None:
    engines = ScriptedEngines(write_folder(tmp_path, tied=True), refusing=refusing)
    copies: list[weakref.ref[torch.Tensor]] = []
    answered = []

    def reduce(tensor: torch.Tensor) -> Reduced:
        copies.append(weakref.ref(tensor))
        return values_of(tensor)

    def collect() -> None:
        assert all(copy() is None for copy in copies)
        answered.append(len(engines.received[0]))

    with running_engines(engines):
        transfer = TensorTransfer(new_buckets(), ByCudaHandle(CPU, reduce, collect))
        if refusing is None:
            update_weights(engines.endpoints, "student", transfer, 5, TIMEOUT)
            assert answered == [1, 2, 3]
            return
        with pytest.raises(WeightUpdateError, match="version 5 not loaded"):
            update_weights(engines.endpoints, "student", transfer, 5, TIMEOUT)
        assert len(answered) == 1


def test_the_models_own_tensors_are_not_shared() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    shared = []

    def reduce(tensor: torch.Tensor) -> Reduced:
        shared.append(tensor)
        return values_of(tensor)

    ByCudaHandle(CPU, reduce, lambda: None).payloads([(EMBEDDING, parameter.T)], 1)
    (copy,) = shared
    assert torch.equal(copy, parameter.T)
    assert copy.is_contiguous()
    assert not copy.requires_grad
    assert copy.data_ptr() != parameter.data_ptr()
