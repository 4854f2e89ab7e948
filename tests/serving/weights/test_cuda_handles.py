"""Handles of CUDA memory, on a CPU: how many are made, for whom, and what SGLang reads from them.

What torch itself does with a GPU is looked at by ``gpu_check.py``.
"""

from __future__ import annotations

import base64
import inspect
import itertools
import pickletools
import subprocess
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import reductions

from sod_mcore.config import EngineConfig, ServingConfig
from sod_mcore.serving.fleet.launch import EnginePlace, engine_environment
from sod_mcore.serving.weights.cuda_handles import (
    DEVICE_ARGUMENT,
    ByCudaHandle,
    Reduced,
    handle_of,
)
from sod_mcore.serving.weights.tensor_transfer import TensorEncoding, TensorTransfer
from sod_mcore.serving.weights.transfer import WeightUpdateError
from sod_mcore.serving.weights.update import update_weights, weight_versions
from sod_mcore.serving.weights.ways import tensor_transfer
from tests.serving.conftest import sglang_python
from tests.serving.scripted_engines import ScriptedEngines, running_engines
from tests.serving.small_weights import EMBEDDING, NORM, new_buckets, opened, write_folder

CPU = torch.device("cpu")
TIMEOUT = 60.0
UUIDS = ("4ef9d8a0-0000", "0b7c2a11-1111")

SGLANG_READS = """
import base64, sys, types
import torch
from torch.multiprocessing import reductions
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

class Model:
    def load_weights(self, named_tensors):
        for name, tensor in named_tensors:
            print("read:", name, tensor.dtype, tensor.tolist())

def rebuild(*arguments):
    print("read:", arguments[:4], arguments[5:])
    return torch.tensor(list(base64.b64decode(sys.argv[2])), dtype=torch.uint8)

uuids = sys.argv[3:]
torch.cuda.device_count = lambda: len(uuids)
torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(uuid=uuids[index])
reductions.rebuild_cuda_tensor = rebuild
monkey_patch_torch_reductions()
payload = MultiprocessingSerializer.deserialize(base64.b64decode(sys.argv[1]))
runner = types.SimpleNamespace(get_model=Model)
print("read:", WeightUpdater._update_weights_from_flattened_bucket(runner, payload))
"""


class Handles:
    """Makes stand-ins that scripted engines can open, each with a number of its own."""

    def __init__(self) -> None:
        self.memory: list[weakref.ref[torch.Tensor]] = []
        self._numbers = itertools.count(1)

    def reduce(self, tensor: torch.Tensor) -> Reduced:
        self.memory.append(weakref.ref(tensor))
        return opened, (next(self._numbers), tensor.tolist())

    def alive(self) -> list[bool]:
        return [memory() is not None for memory in self.memory]


def encoding(
    reduce: Callable[[torch.Tensor], Reduced], collect: Callable[[], object] = lambda: None
) -> ByCudaHandle:
    return ByCudaHandle(CPU, reduce, lambda: (collect(), None)[1])


def engines_on_gpus(
    folder: Path, *, tensor_parallel_sizes: tuple[int, int] = (1, 1), **script: int | None
) -> ScriptedEngines:
    engines = ScriptedEngines(
        write_folder(folder, tied=True), tensor_parallel_sizes=tensor_parallel_sizes, device="cuda"
    )
    for name, value in script.items():
        setattr(engines, name, value)
    return engines


def send(engines: ScriptedEngines, by: TensorEncoding) -> None:
    transfer = TensorTransfer(new_buckets(), by)
    update_weights(engines.endpoints, "student", transfer, 5, TIMEOUT)


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
    """Its own code from the payload to the model, but for torch's function that opens a handle."""
    packed = []

    def reduce(tensor: torch.Tensor) -> Reduced:
        packed.append(bytes(tensor.tolist()))
        rebuild, arguments = cuda_reduction(tensor)
        return rebuild, (*arguments[:DEVICE_ARGUMENT], UUIDS[1], *arguments[DEVICE_ARGUMENT + 1 :])

    bucket = [
        (NORM, torch.tensor([1.5, -2], dtype=torch.bfloat16)),
        (EMBEDDING, torch.arange(6.0).view(2, 3).T),
    ]
    (payload,) = encoding(reduce).payloads(bucket, 1)
    engine, place = EngineConfig(model_path=""), EnginePlace("student", 0, "cpu")
    arguments = [base64.b64encode(value).decode() for value in (payload, packed[0])]
    result = subprocess.run(
        [sglang_python(), "-c", SGLANG_READS, *arguments, *UUIDS],
        env=engine_environment(ServingConfig(student=engine), engine, place),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("read:")] == [
        "read: (<class 'torch.Tensor'>, torch.Size([40]), (1,), 0) "
        "(torch.uint8, 1, b'handle', 24, 512, False, b'/torch_1_2', 64, b'event', True)",
        f"read: {NORM} torch.bfloat16 [1.5, -2.0]",
        f"read: {EMBEDDING} torch.float32 [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]",
        "read: (True, 'Success')",
    ]


def test_every_rank_of_every_engine_gets_a_handle_of_its_own(tmp_path: Path) -> None:
    engines = engines_on_gpus(tmp_path, tensor_parallel_sizes=(3, 1))
    with running_engines(engines):
        send(engines, encoding(Handles().reduce))
        assert weight_versions(engines.endpoints, "student", TIMEOUT) == (5, 5)
    for received, ranks in zip(engines.received, (3, 1), strict=True):
        for request, sent in zip(received, [*new_buckets(), []], strict=True):
            assert len(request.tensors) == ranks
            for tensors in request.tensors:
                assert [name for name, _ in tensors] == [name for name, _ in sent]
                pairs = zip(tensors, sent, strict=True)
                assert all(torch.equal(found, tensor) for (_, found), (_, tensor) in pairs)
    payloads = [p for received in engines.received for r in received[:2] for p in r.payloads]
    numbers = [_handle_in(payload) for payload in payloads]
    assert sorted(numbers) == list(range(1, 9))


def _handle_in(payload: bytes) -> int:
    """The first argument of ``opened``, which follows its name."""
    operations = [(code.name, value) for code, value, _ in pickletools.genops(payload)]
    (start,) = (n for n, (_, value) in enumerate(operations) if value == opened.__name__)
    number = next(v for name, v in operations[start + 1 :] if name.startswith("BININT"))
    assert isinstance(number, int)
    return number


@pytest.mark.parametrize("refusing", [None, 1])
def test_memory_lives_until_its_readers_have_answered(tmp_path: Path, refusing: int | None) -> None:
    engines, handles = engines_on_gpus(tmp_path, refusing=refusing), Handles()
    while_received: list[bool] = []
    collected: list[tuple[int, int]] = []

    def collect() -> None:
        assert not any(handles.alive())
        collected.append((len(engines.received[0]), len(engines.received[1])))

    engines.when_received = lambda: while_received.append(all(handles.alive()[-2:]))
    with running_engines(engines):
        by_handle = encoding(handles.reduce, collect)
        if refusing is None:
            send(engines, by_handle)
            assert collected == [(1, 1), (2, 2)]
            assert while_received == [True] * 4 + [False] * 2, "the last request brings nothing"
            return
        with pytest.raises(WeightUpdateError, match="version 5 not loaded"):
            send(engines, by_handle)
        assert len(collected) == 1


def test_a_gpu_without_room_is_one_clear_error(tmp_path: Path) -> None:
    def reduce(tensor: torch.Tensor) -> Reduced:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    engines, collected = engines_on_gpus(tmp_path), []
    with running_engines(engines):
        by_handle = encoding(reduce, lambda: collected.append(1))
        with pytest.raises(WeightUpdateError, match=r"version 5 not loaded: .*allocate 2 GiB"):
            send(engines, by_handle)
    assert collected == [1]
    assert "continue" not in engines.call_names()


@pytest.mark.parametrize(
    ("device", "pipeline_stages", "expected"),
    [("cpu", 1, "runs on cpu"), ("", 1, "an unknown device"), ("cuda", 2, "2 pipeline stages")],
)
def test_engines_that_would_open_none_or_one_twice(
    tmp_path: Path, device: str, pipeline_stages: int, expected: str
) -> None:
    engines = engines_on_gpus(tmp_path, pipeline_stages=pipeline_stages)
    engines.device = device
    with running_engines(engines), pytest.raises(WeightUpdateError, match=expected) as found:
        send(engines, encoding(Handles().reduce))
    assert "set it to disk" in str(found.value)
    assert engines.received == ([], [])


def test_the_setting_chooses_what_is_sent() -> None:
    by_handle = tensor_transfer("cuda_ipc", [], CPU, None)
    by_value = tensor_transfer("tensor", [], CPU, None)
    assert isinstance(by_handle, TensorTransfer)
    assert isinstance(by_value, TensorTransfer)
    assert by_handle.encoding.load_format == "flattened_bucket"
    assert by_value.encoding.load_format is None
    for way in ("disk", "distributed"):  # without groups
        with pytest.raises(ValueError, match=f"weight_sync={way} sends no tensors"):
            tensor_transfer(way, [], CPU, None)
