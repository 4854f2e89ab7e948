"""Runs a benchmark on real engines: the arithmetic example's, whose teacher plays both models."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from examples.arithmetic.command_line import RECIPE
from examples.arithmetic.make_data import write_data
from examples.arithmetic.settings import ArithmeticSettings
from sod_mcore.config_file import load_config

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "examples" / "arithmetic"
CONFIG = EXAMPLE / "sod.yaml"


def run_while_served(
    module: str, arguments: Sequence[str], train_prompts: int, changes: Sequence[str] = ()
) -> None:
    """Run ``python -m MODULE --served FOLDER ARGUMENTS`` while the engines run.

    Args:
        module: usually the caller itself, which then measures.
        train_prompts: problems in ``FOLDER/data/train.parquet``.
        changes: settings beside :func:`settings`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        small = (f"data.train_prompts={train_prompts}", "data.eval_prompts=32", "data.copy_rows=1")
        write_data(folder / "data", load_config(ArithmeticSettings, RECIPE, small).data)
        again = [sys.executable, "-m", module, "--served", name, *arguments]
        serve = [sys.executable, "-m", "sod_mcore.serving", str(CONFIG)]
        command = [*serve, *settings(folder), *changes, "--", *again]
        subprocess.run(command, cwd=REPOSITORY, check=True)


def settings(folder: Path) -> list[str]:
    """What differs from the example, for the engines and for a run on them."""
    teacher = EXAMPLE / "teacher"
    return [
        f"run.directory={folder}",
        f"serving.directory={folder}",
        f"student.model_path={teacher}",
        f"serving.student.model_path={teacher}",
        f"data.train={folder}/data/train.parquet",
        "evaluation.data=null",
        "algorithm.topk.k=0",
        "algorithm.distillation=advantage",
        "report.wandb=disabled",
    ]
