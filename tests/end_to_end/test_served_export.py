"""The exported folder in the hands of others: SGLang serves it, transformers says the same."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from examples.arithmetic.demonstrations import TOOL
from sod_mcore.chat import ChatRenderer
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.programs import run, write_config

QUESTION = "Calculate 57 + 87."


def test_sglang_answers_a_chat_as_transformers_does(live_run: LiveRun, tmp_path: Path) -> None:
    tree = copy.deepcopy(live_run.tree)
    tree["run"]["directory"] = str(tmp_path)
    tree["serving"]["student"]["model_path"] = str(live_run.exported)
    config = write_config(tmp_path / "serve.yaml", tree)
    answer = tmp_path / "answer.json"
    ask = [sys.executable, "-m", "tests.end_to_end.ask_front_door", str(tmp_path), str(answer)]
    run([sys.executable, "-m", "sod_mcore.serving", str(config), "--", *ask, QUESTION])
    message = json.loads(answer.read_text())
    assert message["content"] == greedy_turn(live_run.exported)


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
