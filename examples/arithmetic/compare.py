"""Which method mends a sloppy student, where tool calls build on each other? Several seeds each.

    python -m examples.arithmetic.compare [--seeds 2 3 4] [--methods sod grpo ...] [key=value ...]

Every method starts from its seed's cold start and makes as many optimizer updates. Everything goes
to ``runs/cascade``, the table to ``table.md`` there. Seed 1 is left out: the learning rate and the
cold start's habits were chosen on it. A cell (a method of a seed) whose result
exists is not run again; ``key=value`` changes settings of all distillation runs and, through
them, the number of updates of fine-tuning, for trials in another folder.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from examples.arithmetic.cells import METHODS, Cell
from examples.arithmetic.comparison_table import comparison_table
from examples.arithmetic.experiment import CASCADE, Experiment
from examples.arithmetic.run import stages
from examples.arithmetic.stages import Stage, run_stages
from scripts.long_tests import describe_commit
from sod_mcore.files import write_text

FOLDER = Path("runs/cascade")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, then print and write the table."""
    options = _read_options(arguments)
    os.chdir(Path(__file__).parents[2])
    cells = [
        Cell(method, _experiment(options.folder, seed), tuple(options.overrides))
        for seed in options.seeds
        for method in options.methods
    ]
    if options.served is not None:
        run_cells([cell for cell in cells if cell.teacher == options.served], options.folder)
        return
    for seed in options.seeds:
        experiment = _experiment(options.folder, seed)
        run_stages(stages(experiment), experiment.folder)
    for teacher in dict.fromkeys(cell.teacher for cell in missing(cells)):
        run_stages([served(cells, teacher, options)], options.folder)
    text = comparison_table(cells)
    write_text(options.folder / "table.md", text)
    if options.report is not None:
        write_text(options.report, report(text, options))
    print(text, flush=True)


def report(tables: str, options: argparse.Namespace) -> str:
    """The tables as a page of their own, with what made them.

    The commit is that of this call; cells that were there already may be older.
    """
    commit = describe_commit()
    choices = ["--seeds", *map(str, options.seeds), "--methods", *options.methods]
    command = " ".join(["python -m examples.arithmetic.compare", *choices, *options.overrides])
    return (
        f"# Methods compared where tool calls build on each other\n\n`{command}` at commit "
        f"{commit} on {date.today():%Y-%m-%d}, on {os.cpu_count()} {platform.machine()} cores. "
        "What is compared: [examples/arithmetic/cascade](../../examples/arithmetic/cascade). Each "
        "number is a mean ± standard error over the seeds, on the held-out problems.\n\n" + tables
    )


def run_cells(cells: Sequence[Cell], engines: Path) -> None:
    """Run what is missing, one after the other, on engines that run already."""
    for experiment, own in itertools.groupby(cells, lambda cell: cell.experiment):
        run_stages([cell.stage(engines) for cell in own], experiment.folder, passes_on_ctrl_c=True)


def missing(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that have no result yet."""
    return [cell for cell in cells if not cell.stage(FOLDER).result.exists()]


def served(cells: Sequence[Cell], teacher: Path, options: argparse.Namespace) -> Stage:
    """All missing cells with this teacher, around one start of the engines.

    Any student will do to start with: each run brings its own weights.
    """
    own = [cell for cell in missing(cells) if cell.teacher == teacher]
    serve = own[0].experiment.serve(
        f"serving.directory={options.folder}", f"serving.teacher.model_path={teacher}"
    )
    again = (
        *("--folder", str(options.folder), "--served", str(teacher)),
        *("--seeds", *map(str, options.seeds), "--methods", *options.methods),
    )
    run = (sys.executable, "-m", "examples.arithmetic.compare", *again, "--", *options.overrides)
    name = f"{len(own)} cells with the teacher {teacher}"
    return Stage(name, own[-1].stage(options.folder).result, [(*serve, "--", *run)])


def _experiment(folder: Path, seed: int) -> Experiment:
    return Experiment(folder / f"seed_{seed}", seed, CASCADE, shared=folder)


def _read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[2, 3, 4], metavar="SEED")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    add("--folder", type=Path, default=FOLDER, help="folder of everything that is made")
    add("--report", type=Path, metavar="FILE", help="also write the tables as a page")
    add("--served", type=Path, metavar="TEACHER", help=argparse.SUPPRESS)
    add("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    main()
