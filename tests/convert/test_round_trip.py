"""Hugging Face -> Megatron -> Hugging Face, for each family, over a grid of layouts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.convert.models import LAYOUTS, NAMES, TOKENS, make_model, write_models

REPOSITORY = Path(__file__).parents[2]
CASES = [f"{name}_{tensor}x{pipeline}" for name in NAMES for tensor, pipeline in LAYOUTS]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks leave behind (rank_program.py)."""
    folder = tmp_path_factory.mktemp("converted")
    write_models(folder / "models")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [sys.executable, *launcher, "-m", "tests.convert.rank_program", str(folder)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-9000:]
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def require_equal(ours: Path, theirs: Path) -> None:
    """Same names, shapes and dtypes, same bits."""
    expected, got = weights(theirs), weights(ours)
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back_bit_for_bit(converted: Path, case: str) -> None:
    source = converted / "models" / case.rsplit("_", 1)[0]
    require_equal(converted / f"{case}_hf", source)
    assert (converted / f"{case}_hf" / "config.json").is_file()
    assert sorted(path.name for path in (converted / case).iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "release",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(converted: Path, name: str) -> None:
    logits = torch.load(converted / "logits.pt")
    source = converted / "models" / name
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = model(TOKENS).logits
    for tensor, pipeline in LAYOUTS:
        ours = logits[f"{name}_{tensor}x{pipeline}"]
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max(), (tensor, pipeline)


def test_scaled_rotary_frequencies_would_be_missed(converted: Path) -> None:
    """The tolerance above tells Llama 3.2's rotary scaling from none."""
    source = converted / "models" / "llama_3_2"
    scaled = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    plain = make_model("llama_3_2", vocab_size=300, tie_word_embeddings=True)
    plain.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    plain = type(plain)(plain.config)
    plain.load_state_dict(scaled.state_dict())
    with torch.no_grad():
        difference = (scaled(TOKENS).logits - plain(TOKENS).logits).abs().max()
        assert difference > 1e-3 * scaled(TOKENS).logits.abs().max()


def test_a_checkpoint_of_training_is_what_the_trainer_exports(converted: Path) -> None:
    require_equal(converted / "converted", converted / "exported")
    assert weights(converted / "converted")["model.norm.weight"].dtype == torch.bfloat16
    before = weights(converted / "models" / "qwen3_tied")["model.norm.weight"].bfloat16()
    assert not torch.equal(weights(converted / "converted")["model.norm.weight"], before)


def test_nothing_temporary_is_left(converted: Path) -> None:
    assert not list(converted.rglob("*.tmp"))
    assert not list(converted.rglob("*.old"))
