"""Makes the teacher that is committed beside this file, and measures it.

    python -m examples.arithmetic.make_teacher

Takes the folder ``runs/arithmetic_teacher``; a result that exists there is kept. The student's run
does not need this: it uses the committed folder.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from examples.arithmetic.experiment import TORCHRUN
from examples.arithmetic.stages import Stage, run_stages

HERE = Path(__file__).parent
FOLDER = Path("runs/arithmetic_teacher")
TEACHER = HERE / "teacher"
PUBLISHED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def main() -> None:
    """Generate, train, measure, and copy the result into this folder."""
    run_stages(stages(), FOLDER)
    TEACHER.mkdir(exist_ok=True)
    for name in (*PUBLISHED, "chat_template.jinja", "generation_config.json"):
        if (FOLDER / "teacher" / name).exists():
            shutil.copyfile(FOLDER / "teacher" / name, TEACHER / name)
    shutil.copyfile(FOLDER / "accuracy.json", TEACHER / "accuracy.json")


def stages() -> list[Stage]:
    """From problems to a measured teacher."""
    python = (sys.executable, "-m")
    data, models = FOLDER / "data", FOLDER / "models"
    tokenizer = FOLDER / "tokenizer"
    config = str(HERE / "sft_teacher.yaml")
    train = (*TORCHRUN, "--nproc-per-node", "1", "scripts/train_sft.py", config)
    copying = (
        f"student.model_path={models}/teacher",
        f"data.train={data}/sft_copy.parquet",
        f"sft.directory={FOLDER}/copy",
        f"sft.export={FOLDER}/copy_model",
        "sft.updates=150",
        "sft.batch_size=64",
        "optimizer.schedule=constant",
    )
    module = "examples.arithmetic."
    serving = (*python, "sod_mcore.serving", str(HERE / "sod.yaml"))
    where = (
        f"run.directory={FOLDER}/evaluation",
        f"serving.directory={FOLDER}",
        f"evaluation.data={data}/eval.parquet",
        f"data.train={data}/train.parquet",
        f"student.model_path={FOLDER}/teacher",
        f"serving.student.model_path={FOLDER}/teacher",
        f"serving.teacher.model_path={FOLDER}/teacher",
    )
    evaluate = (sys.executable, "scripts/evaluate.py", str(HERE / "sod.yaml"), *where)
    accuracy = FOLDER / "accuracy.json"
    make_models = (*python, f"{module}make_models", "--tokenizer", str(tokenizer))
    measure = (*serving, *where, "--", *evaluate, "--weights", f"{FOLDER}/teacher")
    return [
        Stage("data", data, [(*python, f"{module}make_data", "--output", str(data))]),
        Stage(
            "tokenizer",
            tokenizer,
            [(*python, f"{module}make_tokenizer", "--data", str(data), "--output", str(tokenizer))],
        ),
        Stage("models", models, [(*make_models, "--output", str(models))]),
        Stage("copying", FOLDER / "copy_model", [(*train, *copying)]),
        Stage("fine-tuning", FOLDER / "teacher", [train]),
        Stage("evaluation", accuracy, [(*measure, "--output", str(accuracy))]),
    ]


if __name__ == "__main__":
    main()
