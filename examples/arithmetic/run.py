"""The arithmetic example from data to results: what ``make demo`` runs.

    python -m examples.arithmetic.run

Everything goes to ``runs/arithmetic``. A stage whose result exists is skipped, so an interrupted
run continues; delete a result to make it again. The engines start once and serve all stages that
need them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.arithmetic.results import write_results
from examples.arithmetic.stages import TORCHRUN, Stage, run_stages
from sod_mcore.report.step_lines import read_step_lines

HERE = Path("examples/arithmetic")
FOLDER = Path("runs/arithmetic")
TEACHER = HERE / "teacher"
SOD = str(HERE / "sod.yaml")
SFT = str(HERE / "sft_student.yaml")
PRETRAIN = (*TORCHRUN, "--nproc-per-node", "2", "pretrain_sod.py", SOD)
TRAIN_SFT = (*TORCHRUN, "--nproc-per-node", "2", "scripts/train_sft.py", SFT)
SERVED = "--served"


def main(arguments: Sequence[str]) -> None:
    """Run the stages; with ``--served``, those that need the engines, which then run already."""
    os.chdir(Path(__file__).parents[2])
    if SERVED in arguments:
        run_stages([distillation()], FOLDER, passes_on_ctrl_c=True)
        run_stages(controls(training_seconds()), FOLDER, passes_on_ctrl_c=True)
        return
    run_stages([*stages(), served()], FOLDER)
    print(write_results(FOLDER, TEACHER), flush=True)


def stages() -> list[Stage]:
    """What comes before the engines: data, models, cold start."""
    data, models = FOLDER / "data", FOLDER / "models"
    module = (sys.executable, "-m")
    copying = (
        f"student.model_path={models}/student",
        f"data.train={data}/sft_copy.parquet",
        f"sft.directory={FOLDER}/student_copy_training",
        f"sft.export={FOLDER}/student_copy",
        "sft.updates=800",
        "sft.batch_size=64",
        "optimizer.lr=3e-3",
        "optimizer.min_lr=3e-4",
        "optimizer.schedule=linear",
    )
    make_models = (*module, "examples.arithmetic.make_models", "--tokenizer", str(TEACHER))
    return [
        Stage(
            "problems and demonstrations",
            data,
            [(*module, "examples.arithmetic.make_data", "--output", str(data))],
        ),
        Stage("untrained student", models, [(*make_models, "--output", str(models))]),
        Stage("student learns to copy", FOLDER / "student_copy", [(*TRAIN_SFT, *copying)]),
        Stage("student's cold start", FOLDER / "cold_start", [TRAIN_SFT]),
    ]


def served() -> Stage:
    """All stages that need engines, around one start of them."""
    again = (sys.executable, "-m", "examples.arithmetic.run", SERVED)
    serve = (sys.executable, "-m", "sod_mcore.serving", SOD)
    last_result = controls(0.0)[-1].result
    return Stage("distillation and controls", last_result, [(*serve, "--", *again)])


def distillation() -> Stage:
    """Step-wise on-policy distillation, with its evaluations before, during and after."""
    return Stage("step-wise on-policy distillation", FOLDER / "student", [PRETRAIN])


def controls(seconds: float) -> list[Stage]:
    """What should not work as well, with the same budget.

    Args:
        seconds: how long fine-tuning goes on: as long as distillation trained.
    """
    folder = FOLDER / "controls"
    no_tool, sft = folder / "no_tool.json", folder / "sft.json"
    without_learning = (
        "optimizer.lr=0",
        "optimizer.min_lr=0",
        f"run.directory={folder}/lr_0",
        f"run.export={folder}/lr_0_student",
        "evaluation.every=0",
    )
    more_sft = (
        f"student.model_path={FOLDER}/cold_start",
        f"sft.directory={folder}/sft_training",
        f"sft.export={folder}/sft_student",
        "sft.updates=1000000",
        f"sft.max_seconds={seconds:.0f}",
    )
    return [
        Stage(
            "control: no tool at evaluation",
            no_tool,
            [(*evaluate(FOLDER / "student", no_tool), "tools.enabled=false")],
        ),
        Stage(
            "control: learning rate 0",
            folder / "lr_0_student",
            [(*PRETRAIN, *without_learning)],
        ),
        Stage(
            "control: fine-tuning goes on for the same time",
            folder / "sft_student",
            [(*TRAIN_SFT, *more_sft)],
        ),
        Stage("evaluation of that control", sft, [evaluate(folder / "sft_student", sft)]),
    ]


def training_seconds() -> float:
    """Wall time of the distillation's steps, evaluations left out."""
    lines = read_step_lines(FOLDER / "sod" / "metrics.jsonl")
    return sum(line["time/step"] - line.get("time/evaluation", 0.0) for line in lines)


def evaluate(weights: Path, output: Path) -> tuple[str, ...]:
    """The command that measures a Hugging Face folder on the running engines."""
    command = (sys.executable, "scripts/evaluate.py", SOD)
    return (*command, "--weights", str(weights), "--output", str(output))


if __name__ == "__main__":
    main(sys.argv[1:])
