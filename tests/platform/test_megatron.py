"""The preparation of Megatron-Core: when it may happen, and what each patch does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from sod_mcore.platform import megatron, megatron_cpu


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    with pytest.raises(RuntimeError, match=r"megatron-core is 0\.20\.0.*0\.19\.2"):
        megatron._check_version()


def test_an_import_before_the_preparation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.2")
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    with pytest.raises(RuntimeError, match=r"import sod_mcore\.student first"):
        megatron.prepare_megatron()


def test_preparing_twice_installs_one_finder() -> None:
    done = run_python(
        "import sys, sod_mcore.student\n"
        "from sod_mcore.platform.megatron import PatchingFinder, prepare_megatron\n"
        "prepare_megatron()\n"
        "print(sum(isinstance(finder, PatchingFinder) for finder in sys.meta_path))\n"
        "print('megatron.core' in sys.modules)"
    )
    assert done.stdout.split() == ["1", "False"]


def test_patches_run_after_their_module_and_only_there(tmp_path: Any) -> None:
    package = tmp_path / "megatron"
    (package / "core").mkdir(parents=True)
    (package / "core" / "__init__.py").write_text("")
    (package / "core" / "one.py").write_text("value = 1")
    (package / "core" / "two.py").write_text("value = 1")
    calls: list[str] = []

    def patch(module: ModuleType) -> None:
        module.value += 1  # type: ignore[attr-defined]

    finder = megatron.PatchingFinder(
        {"megatron.core.one": [patch]},
        for_every_module=lambda module: calls.append(module.__name__),
    )
    for name, expected in (("one", 2), ("two", 1)):
        spec = finder.find_spec(f"megatron.core.{name}", [str(package / "core")])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.value == expected
    assert calls == ["megatron.core.one", "megatron.core.two"]
    assert finder.find_spec("json") is None


def test_modules_see_a_torch_without_cuda() -> None:
    module = ModuleType("megatron.core.example")
    module.torch = torch  # type: ignore[attr-defined]
    megatron_cpu.rebind_torch(module)
    seen: Any = module.torch
    assert seen.zeros(2, device="cuda").device.type == "cpu"
    assert seen.ones(2, device=seen.cuda.current_device()).device.type == "cpu"
    assert seen.nn is torch.nn
    assert seen.cuda.is_available() == torch.cuda.is_available()
    with seen.cuda.stream(seen.cuda.Stream()):
        seen.cuda.synchronize()
    assert torch.cuda is not seen.cuda


def test_claims_end_with_the_function() -> None:
    class Owner:
        @staticmethod
        def names(tensor: torch.Tensor) -> Any:
            return tensor.type()

    megatron_cpu._claim_cuda_inside(Owner, "names")
    assert Owner.names(torch.zeros(1)) == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_triton_is_a_stub_only_while_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "triton.language"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with megatron_cpu.triton_stub():
        triton = importlib.import_module("triton")
        language = importlib.import_module("triton.language")

        @triton.jit
        def kernel(argument: int) -> int:
            return argument

        assert kernel(3) == 3
        assert language is triton.language
    assert "triton" not in sys.modules
