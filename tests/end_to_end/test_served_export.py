"""The exported folder in the hands of others: SGLang serves it, transformers says the same, and
another run trains it further on the same engines, with weights that are broadcast."""

import copy
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.arithmetic.demonstrations import TOOL
from sod_mcore.chat import ChatRenderer
from sod_mcore.trajectory import RecordedBatch, recorded_batch_path
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.programs import metrics, run, torchrun, write_config

QUESTION = "Calculate 57 + 87."


STEPS = 2


@pytest.fixture(scope="module")
def served(live_run: LiveRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a chat, an evaluation and a training run left, on the same engines."""
    folder = tmp_path_factory.mktemp("served")
    tree = copy.deepcopy(live_run.tree)
    tree["run"] = {"directory": str(folder)}
    tree["serving"]["student"]["model_path"] = str(live_run.exported)
    config = write_config(folder / "serve.yaml", tree)
    ask = [sys.executable, "-m", "tests.end_to_end.ask_front_door"]
    ask += [str(folder), str(folder / "answer.json"), QUESTION]
    evaluate = [sys.executable, "scripts/evaluate.py", str(config)]
    evaluate += ["--weights", str(live_run.exported), "--output", str(folder / "accuracy.json")]
    train = torchrun(2, "pretrain_sod.py", str(training_config(live_run, tree, folder)))
    train += ["--record", str(folder / "recordings")]
    all_three = " && ".join(shlex.join(command) for command in (ask, evaluate, train))
    serve = [sys.executable, "-m", "sod_mcore.serving", str(config)]
    run([*serve, "--", "sh", "-c", all_three], timeout_seconds=540)
    return folder


def training_config(live_run: LiveRun, tree: dict[str, Any], folder: Path) -> Path:
    """Two small steps, with weights that are broadcast in buckets of 1 MiB."""
    tree = copy.deepcopy(tree)
    tree["run"] = {"directory": str(folder / "run"), "steps": STEPS, "save_every": 0}
    tree["student"]["model_path"] = str(live_run.exported)
    tree["algorithm"] |= {"prompts_per_step": 2, "prompts_per_mini_batch": 1}
    tree["evaluation"] = {}
    sync = {"weight_sync": "distributed", "weight_bucket_mb": 1, "directory": str(folder)}
    tree["serving"] |= sync
    return write_config(folder / "train.yaml", tree)


def test_the_export_chats_as_transformers_says(live_run: LiveRun, served: Path) -> None:
    answer = json.loads((served / "answer.json").read_text())
    assert answer["content"] == greedy_turn(live_run.exported)


def test_the_export_evaluates_as_it_trained(live_run: LiveRun, served: Path) -> None:
    name = "evaluation/temperature_0/accuracy"
    accuracy = json.loads((served / "accuracy.json").read_text())[name]
    # Greedy, but batches differ, and float32 sums with them: one problem may fall either way.
    assert abs(accuracy - metrics(live_run.directory)[-1][name]) <= 1 / 32


def test_training_goes_on_with_weights_that_are_broadcast(served: Path) -> None:
    lines = metrics(served / "run")
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert all(line["weights/probe_difference"] < 1e-4 for line in lines)
    assert all(line["update/grad_norm"] > 0 for line in lines[1:])
    for step in range(STEPS):
        batch = RecordedBatch.load(recorded_batch_path(served / "recordings", step))
        for trajectory in batch.trajectories:
            assert (trajectory.weight_version[trajectory.loss_mask] == step).all()
    assert not (served / "run" / "weights").exists()


def greedy_turn(folder: Path) -> str:
    """What transformers generates for the same conversation."""
    renderer = ChatRenderer.from_folder(folder)
    prompt = renderer.render_prompt([{"role": "user", "content": QUESTION}], [TOOL])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(prompt.tolist())[None]
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32
    )
    return renderer.turn_text(generated[0, len(prompt) :].tolist())
