"""The choice of layers, Adam and gradient accumulation, among stand-ins for the GPU packages.

Transformer Engine and Apex install only where CUDA is, so stand-ins in eager torch take their place
(``stand_ins.py``), each set in a process of its own (``backend_program.py``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sod_mcore.student import backend
from sod_mcore.student.backend import Backend
from tests.student.backend_checks import SEQUENCES
from tests.student.harness import REPOSITORY, write_models

TIMEOUT_SECONDS = 420
Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``models/<name>``."""
    path = tmp_path_factory.mktemp("backend")
    write_models(path / "models")
    return path


def run_scenario(folder: Path, scenario: str) -> Results:
    command = [sys.executable, "-W", "ignore", "-m", "tests.student.backend_program"]
    done = subprocess.run(
        [*command, str(folder), scenario],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    results: Results = torch.load(folder / f"{scenario}.pt", weights_only=False)
    return results


@pytest.fixture(scope="module")
def with_transformer_engine(folder: Path) -> Results:
    """Transformer Engine beside Apex and its kernels."""
    return run_scenario(folder, "transformer_engine")


@pytest.fixture(scope="module")
def with_apex(folder: Path) -> Results:
    """Apex and its kernels alone."""
    return run_scenario(folder, "apex")


@pytest.fixture(scope="module")
def without_cuda(folder: Path) -> Results:
    """All of them can be imported, but there is no CUDA device."""
    return run_scenario(folder, "no_cuda")


def test_transformer_engine_is_taken_before_apex(with_transformer_engine: Results) -> None:
    choices = with_transformer_engine["choices"]
    chosen = Backend("transformer_engine", "transformer_engine", True, "", "")
    assert choices["auto"] == choices["asked"] == choices["fusion"] == choices["rope_fusion"]
    assert choices["auto"] == chosen
    assert chosen.describe() == (
        "layers: Transformer Engine; Adam: Transformer Engine's; gradient accumulation: fused"
    )
    assert choices["local"].layers == "local"
    assert "transformer_implementation is local" in choices["local_rope_fusion"]
    assert not choices["no_fusion"].gradient_accumulation_fusion


def test_float32_stays_with_local_layers(with_transformer_engine: Results) -> None:
    choices = with_transformer_engine["choices"]
    assert choices["fp32"].layers == "local"
    assert "needs student.precision bf16, not fp32" in choices["fp32"].describe()
    assert "needs student.precision bf16, not fp32" in choices["asked_fp32"]


def test_layers_are_those_of_megatrons_specification(with_transformer_engine: Results) -> None:
    layers = with_transformer_engine["layers"]
    assert layers["self_attention.linear_qkv"] == "TELayerNormColumnParallelLinear"
    assert layers["self_attention.core_attention"] == "TEDotProductAttention"
    assert layers["self_attention.linear_proj"] == "TERowParallelLinear"
    assert layers["mlp.linear_fc1"] == "TELayerNormColumnParallelLinear"
    assert layers["mlp.linear_fc2"] == "TERowParallelLinear"
    assert layers["input_layernorm"] == layers["pre_mlp_layernorm"] == "IdentityOp"
    assert layers["self_attention.q_layernorm"] == layers["final_layernorm"] == "RMSNorm"


@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize("model_name", ["tied", "qwen2"])
def test_gradients_equal_hugging_face(
    with_transformer_engine: Results, folder: Path, model_name: str, packing: str
) -> None:
    ours = with_transformer_engine["gradients"][model_name, packing]
    model = AutoModelForCausalLM.from_pretrained(
        folder / "models" / model_name, dtype=torch.float32
    )
    loss = torch.zeros(())
    for sequence in SEQUENCES:
        ids = torch.tensor(sequence)
        logits = model(ids[None]).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    loss.backward()
    assert ours["loss"] == pytest.approx(loss.item(), rel=2e-6)
    expected = dict(model.named_parameters())
    assert ours["gradients"].keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(ours["weights"][name], parameter), name
        assert parameter.grad is not None
        error = (ours["gradients"][name] - parameter.grad).abs().max()
        assert error <= 1e-5 * parameter.grad.abs().max(), name


@pytest.mark.parametrize(
    ("fixture", "module"),
    [
        ("with_transformer_engine", "transformer_engine.pytorch.optimizers"),
        ("with_apex", "apex.optimizers"),
    ],
)
def test_fused_adam_trains_and_resumes(
    request: pytest.FixtureRequest, fixture: str, module: str
) -> None:
    run = request.getfixturevalue(fixture)["run"]
    assert run["adam"] == module
    losses = [update.loss for update in run["straight"]]
    assert losses == [update.loss for update in run["resumed"]]
    assert losses[-1] < losses[0] - 1
    for name, weight in run["straight_weights"].items():
        assert torch.equal(weight, run["resumed_weights"][name]), name


def test_checkpoints_pass_between_the_implementations(with_transformer_engine: Results) -> None:
    run = with_transformer_engine["run"]
    for mine, other in zip(run["straight"][2:], run["continued"], strict=True):
        assert other.loss == pytest.approx(mine.loss, rel=5e-3)
    for name, weight in run["local_weights"].items():
        assert torch.equal(weight, run["back_weights"][name]), name
    for mine, other in zip(run["straight"][:2], run["from_scratch_local"], strict=True):
        assert other.loss == pytest.approx(mine.loss, rel=5e-3)


def test_apex_brings_its_adam_but_no_layers(with_apex: Results) -> None:
    choices = with_apex["choices"]
    assert choices["auto"] == Backend(
        "local", "apex", True, "transformer_engine is not installed", ""
    )
    assert "but transformer_engine is not installed" in choices["asked"]
    assert with_apex["layers"]["self_attention.core_attention"] == "SDPAttention"


@pytest.mark.parametrize("fixture", ["with_transformer_engine", "with_apex"])
def test_weight_gradients_go_through_the_kernel(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    results = request.getfixturevalue(fixture)
    output_layer = torch.Size([384, 64])  # 300 tokens, padded
    assert output_layer in results["kernel_calls"]
    fused, not_fused = (results["fusion"][value] for value in (True, False))
    for name, weight in not_fused.items():
        torch.testing.assert_close(fused[name], weight, rtol=0, atol=1e-5, msg=name)


def test_nothing_is_taken_without_cuda(without_cuda: Results) -> None:
    choices = without_cuda["choices"]
    for name in ("auto", "fp32", "local", "no_fusion"):
        chosen = choices[name]
        assert (chosen.layers, chosen.adam) == ("local", "torch")
        assert not chosen.gradient_accumulation_fusion
    assert "needs a CUDA device and there is none" in choices["auto"].describe()
    for name in ("asked", "asked_fp32", "fusion", "rope_fusion"):
        assert "needs a CUDA device and there is none" in choices[name]
        assert "\n" not in choices[name]


@pytest.mark.parametrize("fixture", ["with_transformer_engine", "without_cuda"])
def test_always_refused(request: pytest.FixtureRequest, fixture: str) -> None:
    choices = request.getfixturevalue(fixture)["choices"]
    assert "set student.transformer_implementation" in choices["transformer_impl"]
    assert "context_parallel_size is 2" in choices["context_parallel"]


def test_a_package_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("raise ImportError('undefined symbol: x\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    reason = backend._why_absent("broken_package", "broken_package")
    assert reason == "importing broken_package fails: undefined symbol: x"
    assert backend._why_absent("no_such_package", "x") == "no_such_package is not installed"
