"""One live run of the whole system, shared by the tests of this folder.

The student is the committed teacher with noise on its weights: it still calls the tool, and makes
mistakes that the teacher does not make.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.arithmetic.command_line import RECIPE
from examples.arithmetic.make_data import write_data
from examples.arithmetic.settings import ArithmeticSettings
from sod_mcore.config_file import load_config
from tests.end_to_end.programs import REPOSITORY, TEACHER, run, torchrun, write_config

STEPS = 4
SMALL_DATA = (
    "data.train_prompts=64",
    "data.eval_prompts=32",
    "data.copy_rows=1",
    "data.teacher.conversations=1",
    "data.student.conversations=1",
)
NOISE = 0.55
"""Relative to each matrix's own standard deviation."""


@dataclass(frozen=True)
class LiveRun:
    """Where the run was made and what it printed."""

    config: Path
    tree: dict[str, Any]
    directory: Path
    recordings: Path
    exported: Path
    output: str


@pytest.fixture(scope="session")
def live_run(tmp_path_factory: pytest.TempPathFactory) -> LiveRun:
    """Engines, tools, trainer at tensor parallelism 2: a few steps with everything on."""
    folder = tmp_path_factory.mktemp("live")
    student = noisy_student(folder / "student")
    (folder / "data").mkdir()
    write_data(folder / "data", load_config(ArithmeticSettings, RECIPE, SMALL_DATA).data)
    tree = configuration(folder, student)
    config = write_config(folder / "sod.yaml", tree)
    train = torchrun(2, "pretrain_sod.py", str(config), "--record", str(folder / "recordings"))
    serve = [sys.executable, "-m", "sod_mcore.serving", str(config)]
    done = run([*serve, "--", *train], timeout_seconds=540)
    return LiveRun(
        config, tree, folder / "run", folder / "recordings", folder / "export", done.stdout
    )


def noisy_student(folder: Path) -> Path:
    """The teacher with Gaussian noise on its matrices, as a Hugging Face folder."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(NOISE * parameter.std() * noise)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(folder)
    return folder


def configuration(folder: Path, student: Path) -> dict[str, Any]:
    """A run of minutes."""
    engine: dict[str, Any] = {"dtype": "float32", "context_length": 512}
    return {
        "run": {
            "directory": str(folder / "run"),
            "steps": STEPS,
            "save_every": 0,
            "export": str(folder / "export"),
        },
        "student": {
            "model_path": str(student),
            "precision": "fp32",
            "packing": "padded",
            "megatron": {"tensor_model_parallel_size": 2},
        },
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
        "data": {"train": str(folder / "data" / "train.parquet"), "max_prompt_tokens": 128},
        "algorithm": {
            "prompts_per_step": 8,
            "group_size": 4,
            "prompts_per_mini_batch": 2,
            "topk": {"k": 16},
        },
        "rollout": {"max_turns": 6, "max_response_tokens": 256, "max_turn_tokens": 32},
        "tools": {"traceback": "last_line", "workers": 4},
        "evaluation": {"data": str(folder / "data" / "eval.parquet"), "temperatures": [0.0]},
        "serving": {
            "python": str(REPOSITORY / ".venv-sglang" / "bin" / "python"),
            "student": {"model_path": str(student), **engine},
            "teacher": {"model_path": str(TEACHER), **engine},
        },
    }


def colocated_configuration(folder: Path) -> dict[str, Any]:
    """A shorter run, on engines that sleep while it trains; ``folder`` tells their addresses."""
    (folder / "data").mkdir()
    write_data(folder / "data", load_config(ArithmeticSettings, RECIPE, SMALL_DATA).data)
    tree = configuration(folder, noisy_student(folder / "student"))
    tree["algorithm"] |= {"prompts_per_step": 4, "topk": {"k": 0}}
    tree["serving"] |= {"directory": str(folder), "placement": "colocated"}
    tree["report"] = {"wandb": "disabled"}
    for name in ("student", "teacher"):
        tree["serving"][name]["max_total_tokens"] = 16384
    return tree
