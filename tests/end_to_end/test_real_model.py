"""A real pretrained model through everything: converted, trained, exported, served, asked."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sod_mcore.chat import ChatRenderer
from sod_mcore.student.model_config import ParallelSizes
from sod_mcore.student.parallel_state import distributed
from sod_mcore.trajectory import RecordedBatch
from tests.convert.logits import logits_of
from tests.end_to_end.programs import REPOSITORY, metrics, run, torchrun, write_config
from tests.end_to_end.smollm2 import record_batch, token_logprobs, write_smollm2

CONVERT = (sys.executable, "-m", "sod_mcore.convert")
QUESTION = "What is the capital of France?"
LEARNING_RATE = 1e-6
"""Adam's first update moves every weight by as much; ten times more makes the answer worse."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``model`` and ``batch.npz``."""
    folder = tmp_path_factory.mktemp("smollm2")
    source = write_smollm2(folder / "model")
    record_batch(load(source), source).save(folder / "batch.npz")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    """The model as a Megatron checkpoint, written by three tensor-parallel ranks."""
    out = folder / "megatron"
    run([*CONVERT, "to-megatron", f"{folder / 'model'}", f"{out}", "--tensor-parallel", "3"])
    return out


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The run of one SOD step on two pipeline stages, and its export."""
    tree = {
        "run": {
            "directory": f"{folder / 'run'}",
            "steps": 1,
            "save_every": 0,
            "export": f"{folder / 'export'}",
        },
        "student": {
            "model_path": f"{folder / 'model'}",
            "precision": "fp32",
            "megatron": {"pipeline_model_parallel_size": 2},
        },
        "optimizer": {"lr": LEARNING_RATE, "weight_decay": 0.0},
        "data": {"train": "not read in a replay"},
        "algorithm": {"prompts_per_step": 2, "group_size": 2, "prompts_per_mini_batch": 2},
        "report": {"wandb": "disabled"},
    }
    config = write_config(folder / "train.yaml", tree)
    run([*torchrun(2, "pretrain_sod.py", f"{config}"), "--replay", f"{folder / 'batch.npz'}"])
    return folder / "run"


def load(folder: Path) -> Any:
    """The model by transformers, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_it_comes_back_bit_for_bit(folder: Path, checkpoint: Path) -> None:
    out = folder / "back"
    run([*CONVERT, "to-hf", f"{checkpoint}", f"{out}", "--like", f"{folder / 'model'}"])
    expected = load_file(folder / "model" / "model.safetensors")
    got = load_file(out / "model.safetensors")
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_logits_are_those_of_transformers(folder: Path, checkpoint: Path) -> None:
    batch = RecordedBatch.load(folder / "batch.npz")
    tokens = torch.from_numpy(batch.trajectories[0].token_ids).long()[None]
    with torch.no_grad():
        expected = load(folder / "model")(tokens).logits
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with distributed(ParallelSizes(1, 1, 1, 1), seed=0) as layout:
        logits = logits_of(folder / "model", checkpoint, layout, tokens)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_one_step_of_training(folder: Path, trained: Path) -> None:
    (line,) = [line for line in metrics(trained) if "update/loss" in line]
    student = load(folder / "model")
    differences = [
        (token_logprobs(student, t.token_ids) - t.teacher_logprobs)[t.loss_mask]
        for t in RecordedBatch.load(folder / "batch.npz").trajectories
    ]
    expected = np.concatenate(differences).mean()
    assert abs(expected) > 0.01
    assert line["distillation/reverse_kl"] == pytest.approx(expected, abs=1e-4)
    assert np.isfinite(line["update/loss"])
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / "export" / "model.safetensors")
    for name, tensor in before.items():
        # Adam's first update is the learning rate times a number of at most 1, before rounding.
        change = (after[name] - tensor).abs().max()
        assert 0 < change <= 2 * LEARNING_RATE, name


def test_the_export_is_served_and_answers(folder: Path, trained: Path) -> None:
    directory, answer = folder / "serving", folder / "answer.json"
    engine = {"model_path": f"{folder / 'export'}", "dtype": "float32", "context_length": 256}
    tree = {
        "run": {"directory": f"{directory}"},
        "student": {"model_path": f"{folder / 'export'}"},
        "data": {"train": "not read when serving"},
        "serving": {
            "python": f"{REPOSITORY / '.venv-sglang' / 'bin' / 'python'}",
            "student": engine,
        },
    }
    config = write_config(folder / "serve.yaml", tree)
    ask = [sys.executable, "-m", "tests.end_to_end.ask_front_door", f"{directory}", f"{answer}"]
    command = ["sh", "-c", shlex.join([*ask, QUESTION, "--no-tools"])]
    run([sys.executable, "-m", "sod_mcore.serving", f"{config}", "--", *command])
    assert json.loads(answer.read_text())["content"] == greedy_turn(folder / "export")


def greedy_turn(folder: Path) -> str:
    """What transformers generates for the same conversation."""
    renderer = ChatRenderer.from_folder(folder)
    prompt = renderer.render_prompt([{"role": "user", "content": QUESTION}])
    ids = torch.from_numpy(prompt).long()[None]
    generated = load(folder).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32
    )
    text = renderer.turn_text(generated[0, len(prompt) :].tolist())
    assert "Paris" in text, "the weights are damaged"
    return text
