"""Megatron-LM itself loads what ``python -m sod_mcore.convert`` writes, and we read what it saves.

The rank program (megatron_program.py) runs ``megatron.training`` of the installed megatron-core
wheel: its argument parser with ``--use-checkpoint-args``, its model builder with the stock local
layers, its ``load_checkpoint`` and ``save_checkpoint``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sod_mcore.convert import main
from tests.convert.megatron_program import SAVED_ITERATION
from tests.convert.models import TOKENS, make_model

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
VOCAB_SIZE = 300
VOCABULARY_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")

FAMILY_OPTIONS = {
    "llama": ["--use-rope-scaling"],
    "qwen2": [],
    "qwen3": ["--qk-layernorm"],
}
"""What docs/conversion.md says that Megatron-LM does not take from a checkpoint."""
# Transformer Engine, Apex and CUDA are absent, and training needs a batch and a length.
OF_THIS_MACHINE = [
    *["--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"],
    *["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"],
    *["--distributed-backend", "gloo", "--micro-batch-size", "1", "--seq-length", "64"],
    *["--save-interval", "1", "--no-save-optim"],
]


@dataclass(frozen=True)
class Case:
    """A model, the tensor-parallel size that wrote it, and the layout that loads it."""

    model: str
    written: int
    tensor: int
    pipeline: int


@dataclass(frozen=True)
class Loaded:
    """What the ranks left, and the Hugging Face folder that it all came from."""

    source: Path
    saved: Path
    ranks: list[dict[str, Any]]


CASES = [
    Case("qwen3_untied", written=2, tensor=1, pipeline=1),
    Case("qwen3_tied", written=1, tensor=2, pipeline=1),
    Case("qwen2_tied", written=1, tensor=1, pipeline=2),
    Case("llama_3_1", written=1, tensor=1, pipeline=1),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Convert a random model, then let Megatron-LM load it."""
    case: Case = request.param
    folder = tmp_path_factory.mktemp("megatron")
    write_model(case.model, folder / "source")
    convert(folder, case.written)
    num_ranks = case.tensor * case.pipeline
    run(
        [
            *[*TORCHRUN, f"{num_ranks}", "-m", "tests.convert.megatron_program"],
            *["--source", "source", "--results", ".", "--save", "saved"],
            *["--load", "checkpoint", "--use-checkpoint-args", "--norm-epsilon", "1e-6"],
            *FAMILY_OPTIONS[case.model[:5]],
            *["--tensor-model-parallel-size", f"{case.tensor}"],
            *["--pipeline-model-parallel-size", f"{case.pipeline}"],
            *["--dist-ckpt-strictness", "raise_all", *OF_THIS_MACHINE],
        ],
        folder,
    )
    ranks = [torch.load(folder / f"rank_{rank}.pt") for rank in range(num_ranks)]
    return Loaded(folder / "source", folder / "saved", ranks)


def write_model(name: str, folder: Path) -> None:
    """A model whose norms do not have the weights that Megatron's new models start with."""
    torch.manual_seed(0)
    is_tied = not name.endswith("untied")
    model = make_model(name, vocab_size=VOCAB_SIZE, tie_word_embeddings=is_tied)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def convert(folder: Path, tensor_parallel: int) -> None:
    """The command; in this process where it needs no others, which saves its start."""
    arguments = ["to-megatron", f"{folder / 'source'}", f"{folder / 'checkpoint'}"]
    if tensor_parallel == 1:
        main(arguments)
    else:
        command = [sys.executable, "-m", "sod_mcore.convert", *arguments]
        run([*command, "--tensor-parallel", f"{tensor_parallel}"], folder)


def run(command: list[str], folder: Path) -> None:
    """Run it in ``folder``, with this checkout's modules; show its output if it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-9000:]


def vocabulary(ranks: list[dict[str, Any]], loader: str, name: str) -> torch.Tensor:
    """The rows of all ranks without padding, whose amount each loader chooses for itself."""
    shards = [rank[loader][name] for rank in ranks if name in rank[loader]]
    return torch.cat(shards)[:VOCAB_SIZE]


def test_parameters_are_those_of_our_loader(loaded: Loaded) -> None:
    for rank in loaded.ranks:
        assert set(rank["megatron"]) == set(rank["ours"])
        for name, parameter in rank["megatron"].items():
            if name in VOCABULARY_ROWS:
                ours = vocabulary(loaded.ranks, "ours", name)
                assert torch.equal(vocabulary(loaded.ranks, "megatron", name), ours), name
            else:
                assert torch.equal(parameter, rank["ours"][name]), name


def test_every_parameter_comes_from_the_checkpoint(loaded: Loaded) -> None:
    for rank in loaded.ranks:
        for name, parameter in rank["megatron"].items():
            assert not torch.equal(parameter, rank["fresh"][name]), name


def test_logits_are_those_of_transformers(loaded: Loaded) -> None:
    model = AutoModelForCausalLM.from_pretrained(loaded.source, dtype=torch.float32)
    with torch.no_grad():
        expected = model(TOKENS).logits
    difference = (loaded.ranks[0]["logits"] - expected).abs().max()
    assert difference <= 1e-4 * expected.abs().max()


def test_training_starts_at_iteration_0(loaded: Loaded) -> None:
    for rank in loaded.ranks:
        assert rank["load_checkpoint"] == (0, 0)
        assert rank["checkpoint_version"] == 3.0


def test_what_megatron_saves_comes_back_bit_for_bit(loaded: Loaded, tmp_path: Path) -> None:
    tracker = loaded.saved / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(SAVED_ITERATION)
    main(["to-hf", f"{loaded.saved}", f"{tmp_path / 'back'}", "--like", f"{loaded.source}"])
    expected = load_file(loaded.source / "model.safetensors")
    got = load_file(tmp_path / "back" / "model.safetensors")
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
