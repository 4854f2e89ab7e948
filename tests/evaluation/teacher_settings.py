"""An evaluation of the committed teacher with a real engine, and the samples that it leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from examples.arithmetic.command_line import RECIPE
from examples.arithmetic.make_data import write_data
from examples.arithmetic.settings import ArithmeticSettings
from sod_mcore.config_file import load_config
from tests.end_to_end.programs import TEACHER
from tests.serving.conftest import sglang_python

PROBLEMS = 16
_SMALL_DATA = (
    "data.train_prompts=1",
    f"data.eval_prompts={PROBLEMS}",
    "data.copy_rows=1",
    "data.teacher.conversations=1",
    "data.student.conversations=1",
)


def settings(folder: Path) -> dict[str, Any]:
    """Settings of an evaluation in ``folder``, whose data are written there."""
    (folder / "data").mkdir()
    write_data(folder / "data", load_config(ArithmeticSettings, RECIPE, _SMALL_DATA).data)
    return {
        "evaluation": {
            "data": str(folder / "data" / "eval.parquet"),
            "output": str(folder / "output"),
            "top_p": 1.0,
            "max_prompt_tokens": 128,
        },
        "serving": {
            "python": sglang_python(),
            "student": {
                "model_path": str(TEACHER),
                "dtype": "float32",
                "context_length": 512,
            },
        },
        "rollout": {"max_turns": 6, "max_response_tokens": 256, "max_turn_tokens": 32},
        "tools": {"workers": 4},
    }


def command(config: Path) -> list[str]:
    """The program, with a file of settings."""
    return [sys.executable, "-m", "sod_mcore.evaluation", str(config)]


def samples(config: Path) -> list[dict[str, Any]]:
    """What the evaluation of the file ``config`` has drawn so far."""
    file = config.parent / "output" / "samples.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]
