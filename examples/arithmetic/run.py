"""The arithmetic example from data to results: what ``make demo`` runs.

    python -m examples.arithmetic.run [--seed N] [--folder FOLDER]

Everything goes to ``runs/arithmetic``. A stage whose result exists is skipped, so an interrupted
run continues; delete a result to make it again. The engines start once and serve all stages that
need them. Another seed needs a folder of its own; ``examples.arithmetic.seeds`` runs several.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from examples.arithmetic.experiment import DEFAULT_FOLDER, DEFAULT_SEED, TEACHER, Experiment
from examples.arithmetic.results import write_results
from examples.arithmetic.stages import Stage, run_stages
from sod_mcore.report.step_lines import read_step_lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages; with ``--served``, those that need the engines, which then run already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--served", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    os.chdir(Path(__file__).parents[2])
    experiment = Experiment(options.folder, options.seed)
    if options.served:
        run_stages([distillation(experiment)], experiment.folder, passes_on_ctrl_c=True)
        seconds = training_seconds(experiment)
        run_stages(controls(experiment, seconds), experiment.folder, passes_on_ctrl_c=True)
        return
    run_stages([*stages(experiment), served(experiment)], experiment.folder)
    print(write_results(experiment.folder, TEACHER), flush=True)


def stages(experiment: Experiment) -> list[Stage]:
    """What comes before the engines: data, models, cold start."""
    copying = (
        f"student.model_path={experiment.models}/student",
        f"data.train={experiment.data}/sft_copy.parquet",
        f"sft.directory={experiment.folder}/student_copy_training",
        f"sft.export={experiment.copy}",
        "sft.updates=800",
        "sft.batch_size=64",
        "optimizer.lr=3e-3",
        "optimizer.min_lr=3e-4",
        "optimizer.schedule=linear",
    )
    return [
        Stage("problems and demonstrations", experiment.data, [experiment.make_data()]),
        Stage("untrained student", experiment.models, [experiment.make_models()]),
        Stage("student learns to copy", experiment.copy, [experiment.train_sft(*copying)]),
        Stage("student's cold start", experiment.cold_start, [experiment.train_sft()]),
    ]


def served(experiment: Experiment) -> Stage:
    """All stages that need engines, around one start of them."""
    command = (*experiment.serve(), "--", *experiment.run_served())
    last_result = controls(experiment, 0.0)[-1].result
    return Stage("distillation and controls", last_result, [command])


def distillation(experiment: Experiment) -> Stage:
    """Step-wise on-policy distillation, with its evaluations before, during and after."""
    return Stage("step-wise on-policy distillation", experiment.student, [experiment.pretrain()])


def controls(experiment: Experiment, seconds: float) -> list[Stage]:
    """What should not work as well, with the same budget.

    Args:
        seconds: how long fine-tuning goes on: as long as distillation trained.
    """
    folder = experiment.controls
    no_tool, sft = folder / "no_tool.json", folder / "sft.json"
    without_learning = (
        "optimizer.lr=0",
        "optimizer.min_lr=0",
        f"run.directory={folder}/lr_0",
        f"run.export={folder}/lr_0_student",
        "evaluation.every=0",
    )
    more_sft = (
        f"student.model_path={experiment.cold_start}",
        f"sft.directory={folder}/sft_training",
        f"sft.export={folder}/sft_student",
        "sft.updates=1000000",
        f"sft.max_seconds={seconds:.0f}",
    )
    return [
        Stage(
            "control: no tool at evaluation",
            no_tool,
            [experiment.evaluate(experiment.student, no_tool, "tools.enabled=false")],
        ),
        Stage(
            "control: learning rate 0",
            folder / "lr_0_student",
            [experiment.pretrain(*without_learning)],
        ),
        Stage(
            "control: fine-tuning goes on for the same time",
            folder / "sft_student",
            [experiment.train_sft(*more_sft)],
        ),
        Stage(
            "evaluation of that control", sft, [experiment.evaluate(folder / "sft_student", sft)]
        ),
    ]


def training_seconds(experiment: Experiment) -> float:
    """Wall time of the distillation's steps, evaluations left out."""
    lines = read_step_lines(experiment.folder / "sod" / "metrics.jsonl")
    return sum(line["time/step"] - line.get("time/evaluation", 0.0) for line in lines)


if __name__ == "__main__":
    main()
