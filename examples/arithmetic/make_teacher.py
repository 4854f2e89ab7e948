"""Makes the teacher that is committed in a recipe's folder, and measures it.

    python -m examples.arithmetic.make_teacher
    python -m examples.arithmetic.make_teacher --recipe examples/arithmetic/cascade \\
        --output runs/cascade_teacher --tokenizer examples/arithmetic/teacher

A result that exists in the run folder is kept. The student's run does not need this: it uses the
committed folder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.arithmetic.experiment import HERE, TORCHRUN, recipe_teacher
from examples.arithmetic.stages import Stage, run_stages

FOLDER = Path("runs/arithmetic_teacher")
PUBLISHED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate, train, measure, and copy the result into the recipe's folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=HERE, help="folder of the YAML files")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of everything made")
    parser.add_argument("--tokenizer", type=Path, help="folder of one to use; else one is trained")
    options = parser.parse_args(arguments)
    made, teacher = options.output, recipe_teacher(options.recipe)
    run_stages(stages(options.recipe, made, options.tokenizer), made)
    teacher.mkdir(exist_ok=True)
    for name in (*PUBLISHED, "chat_template.jinja", "generation_config.json"):
        if (made / "teacher" / name).exists():
            shutil.copyfile(made / "teacher" / name, teacher / name)
    shutil.copyfile(made / "accuracy.json", teacher / "accuracy.json")


def stages(recipe: Path, folder: Path, given_tokenizer: Path | None) -> list[Stage]:
    """From problems to a measured teacher; a tokenizer that exists already is not made."""
    data, models = folder / "data", folder / "models"
    tokenizer = given_tokenizer or folder / "tokenizer"
    return [
        Stage("data", data, [_generator("make_data", recipe, data)]),
        Stage(
            "tokenizer",
            tokenizer,
            [_generator("make_tokenizer", recipe, tokenizer, "--data", str(data))],
        ),
        Stage(
            "models",
            models,
            [_generator("make_models", recipe, models, "--tokenizer", str(tokenizer))],
        ),
        Stage("copying", folder / "copy_model", [_copying(recipe, folder)]),
        Stage("fine-tuning", folder / "teacher", [_fine_tuning(recipe, folder)]),
        Stage("evaluation", folder / "accuracy.json", [_evaluation(recipe, folder)]),
    ]


def _generator(name: str, recipe: Path, output: Path, *options: str) -> tuple[str, ...]:
    files = ("--recipe", str(recipe / "recipe.yaml"), "--output", str(output))
    return (sys.executable, "-m", f"examples.arithmetic.{name}", *files, *options)


def _train(recipe: Path) -> tuple[str, ...]:
    program = ("scripts/train_sft.py", str(recipe / "sft_teacher.yaml"))
    return (*TORCHRUN, "--nproc-per-node", "1", *program)


def _copying(recipe: Path, folder: Path) -> tuple[str, ...]:
    return (
        *_train(recipe),
        f"student.model_path={folder}/models/teacher",
        f"data.train={folder}/data/sft_copy.parquet",
        f"sft.directory={folder}/copy",
        f"sft.export={folder}/copy_model",
        "sft.updates=150",
        "sft.batch_size=64",
        "optimizer.schedule=constant",
    )


def _fine_tuning(recipe: Path, folder: Path) -> tuple[str, ...]:
    return (
        *_train(recipe),
        f"student.model_path={folder}/copy_model",
        f"data.train={folder}/data/sft_teacher.parquet",
        f"sft.directory={folder}/sft",
        f"sft.export={folder}/teacher",
    )


def _evaluation(recipe: Path, folder: Path) -> tuple[str, ...]:
    """Serve the teacher as student too, and measure that."""
    config = str(recipe / "sod.yaml")
    where = (
        f"run.directory={folder}/evaluation",
        f"serving.directory={folder}",
        f"evaluation.data={folder}/data/eval.parquet",
        f"data.train={folder}/data/train.parquet",
        f"student.model_path={folder}/teacher",
        f"serving.student.model_path={folder}/teacher",
        f"serving.teacher.model_path={folder}/teacher",
    )
    files = ("--weights", f"{folder}/teacher", "--output", f"{folder}/accuracy.json")
    serve = (sys.executable, "-m", "sod_mcore.serving", config, *where)
    return (*serve, "--", sys.executable, "scripts/evaluate.py", config, *where, *files)


if __name__ == "__main__":
    main()
