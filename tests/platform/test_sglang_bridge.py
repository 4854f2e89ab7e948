"""The real SGLang imports without CUDA, with the parts replaced that are slow on a CPU."""

from __future__ import annotations

import subprocess

from sod_mcore.config import EngineConfig, ServingConfig
from sod_mcore.serving.fleet.launch import EnginePlace, engine_environment
from tests.serving.conftest import sglang_python

PROGRAM = """
import inspect
from sglang.srt.layers import sampler
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as backend
from sglang.srt.models import qwen3
import sgl_kernel, torch

print(sampler.sampling_from_probs_torch.__module__)
print(backend._run_sdpa_forward_decode.__module__)
print(list(inspect.signature(backend.forward_decode).parameters)[:4])
print(torch.backends.mps.is_available(), torch.cuda.is_available())
try:
    sgl_kernel.some_kernel(1)
except NotImplementedError as error:
    print(error)
"""


def test_import() -> None:
    engine = EngineConfig(model_path="")
    place = EnginePlace("student", 0, "cpu")
    environment = engine_environment(ServingConfig(student=engine), engine, place)
    result = subprocess.run(
        [sglang_python(), "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-5:] == [
        "inverse_sampling",
        "batched_attention",
        "['self', 'q', 'k', 'v']",
        "False False",
        "sgl_kernel.some_kernel exists only where there is a GPU",
    ]
