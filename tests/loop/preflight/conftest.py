"""Settings for the tests of the preflight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.loop.preflight.wrong_settings import model_folder, prompts


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A configuration with nothing wrong in it but that no engine runs."""
    return {
        "run": {"directory": str(tmp_path / "run")},
        "student": {
            "model_path": str(model_folder(tmp_path / "student", ["a", "b"])),
            "precision": "fp32",
        },
        "data": {"train": str(prompts(tmp_path / "train.parquet", ["2+2?", "3+3?"]))},
        "algorithm": {"prompts_per_step": 2, "prompts_per_mini_batch": 1},
        "evaluation": {"data": str(prompts(tmp_path / "eval.parquet", ["4+4?"]))},
        "serving": {
            "student": {"model_path": str(tmp_path / "student")},
            "teacher": {"model_path": str(model_folder(tmp_path / "teacher", ["a", "b"]))},
        },
    }
