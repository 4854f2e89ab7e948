"""The exported folder in the hands of others: SGLang serves it, transformers says the same."""

import copy
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from examples.arithmetic.demonstrations import TOOL
from sod_mcore.chat import ChatRenderer
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.programs import metrics, run, write_config

QUESTION = "Calculate 57 + 87."


def test_the_export_serves_chats_and_evaluates_as_it_trained(
    live_run: LiveRun, tmp_path: Path
) -> None:
    tree = copy.deepcopy(live_run.tree)
    tree["run"]["directory"] = str(tmp_path)
    tree["serving"]["student"]["model_path"] = str(live_run.exported)
    config = write_config(tmp_path / "serve.yaml", tree)
    answer, accuracy = tmp_path / "answer.json", tmp_path / "accuracy.json"
    ask = [sys.executable, "-m", "tests.end_to_end.ask_front_door", str(tmp_path), str(answer)]
    evaluate = [sys.executable, "scripts/evaluate.py", str(config)]
    evaluate += ["--weights", str(live_run.exported), "--output", str(accuracy)]
    both = f"{shlex.join([*ask, QUESTION])} && {shlex.join(evaluate)}"
    run([sys.executable, "-m", "sod_mcore.serving", str(config), "--", "sh", "-c", both])

    assert json.loads(answer.read_text())["content"] == greedy_turn(live_run.exported)
    name = "evaluation/temperature_0/accuracy"
    # Greedy, but batches differ, and float32 sums with them: one problem may fall either way.
    expected = metrics(live_run.directory)[-1][name]
    assert abs(json.loads(accuracy.read_text())[name] - expected) <= 1 / 32


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
