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
from examples.arithmetic.stages import TORCHRUN, Stage, read_seconds, run_stages

HERE = Path("examples/arithmetic")
FOLDER = Path("runs/arithmetic")
TEACHER = HERE / "teacher"
SOD = str(HERE / "sod.yaml")
SFT = str(HERE / "sft_student.yaml")
SERVED = "--served"


def main(arguments: Sequence[str]) -> None:
    """Run the stages; with ``--served``, those that need the engines, which then run already."""
    os.chdir(Path(__file__).parents[2])
    if SERVED in arguments:
        run_stages(served_stages(), FOLDER, passes_on_ctrl_c=True)
        return
    run_stages([*stages(), served()], FOLDER)
    print(write_results(FOLDER, TEACHER), flush=True)


def stages() -> list[Stage]:
    """What comes before the engines: data, models, cold start."""
    data, models = FOLDER / "data", FOLDER / "models"
    module = (sys.executable, "-m")
    train = (*TORCHRUN, "--nproc-per-node", "2", "scripts/train_sft.py", SFT)
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
        Stage("student learns to copy", FOLDER / "student_copy", [(*train, *copying)]),
        Stage("student's cold start", FOLDER / "cold_start", [train]),
    ]


def served() -> Stage:
    """All stages that need engines, around one start of them."""
    again = (sys.executable, "-m", "examples.arithmetic.run", SERVED)
    serve = (sys.executable, "-m", "sod_mcore.serving", SOD)
    return Stage("distillation and controls", served_stages()[-1].result, [(*serve, "--", *again)])


def served_stages() -> list[Stage]:
    """Distillation, then the controls with the same budget."""
    pretrain = (*TORCHRUN, "--nproc-per-node", "2", "pretrain_sod.py", SOD)
    student, controls = FOLDER / "student", FOLDER / "controls"
    no_tool, sft = controls / "no_tool.json", controls / "sft.json"
    seconds = read_seconds(FOLDER).get("step-wise on-policy distillation", 300.0)
    without_learning = (
        "optimizer.lr=0",
        "optimizer.min_lr=0",
        f"run.directory={controls}/lr_0",
        f"run.export={controls}/lr_0_student",
        "evaluation.every=0",
    )
    more_sft = (
        f"student.model_path={FOLDER}/cold_start",
        f"sft.directory={controls}/sft_training",
        f"sft.export={controls}/sft_student",
        "sft.updates=1000000",
        f"sft.max_seconds={seconds:.0f}",
    )
    train_sft = (*TORCHRUN, "--nproc-per-node", "2", "scripts/train_sft.py", SFT)
    return [
        Stage("step-wise on-policy distillation", student, [pretrain]),
        Stage(
            "control: no tool at evaluation",
            no_tool,
            [(*evaluate(student, no_tool), "tools.enabled=false")],
        ),
        Stage(
            "control: learning rate 0",
            controls / "lr_0_student",
            [(*pretrain, *without_learning)],
        ),
        Stage(
            "control: fine-tuning goes on for the same time",
            sft,
            [(*train_sft, *more_sft), evaluate(controls / "sft_student", sft)],
        ),
    ]


def evaluate(weights: Path, output: Path) -> tuple[str, ...]:
    """The command that measures a Hugging Face folder on the running engines."""
    command = (sys.executable, "scripts/evaluate.py", SOD)
    return (*command, "--weights", str(weights), "--output", str(output))


if __name__ == "__main__":
    main(sys.argv[1:])
