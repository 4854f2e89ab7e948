"""Does the gain hold? The example again for several seeds, with mean and standard error.

    python -m examples.arithmetic.seeds [SEED ...]

Seed ``n`` runs in ``runs/arithmetic_seeds/n``; what exists there is not run again. What a seed sets
is told in ``experiment.py``. The table goes to ``runs/arithmetic_seeds/table.md``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from examples.arithmetic.experiment import TEACHER
from examples.arithmetic.results import Row, read_rows
from sod_mcore.files import write_text

FOLDER = Path("runs/arithmetic_seeds")
HEADER = ("", "temperature 1", "greedy", "trajectories with a failed call")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example for each seed, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", type=int, nargs="*", default=[1, 2, 3], metavar="SEED")
    seeds = parser.parse_args(arguments).seeds
    folders = [FOLDER / str(seed) for seed in seeds]
    for seed, folder in zip(seeds, folders, strict=True):
        command = (sys.executable, "-m", "examples.arithmetic.run", "--seed", str(seed))
        code = subprocess.run([*command, "--folder", str(folder)], check=False).returncode
        if code != 0:
            raise SystemExit(code)
    text = table([read_rows(folder, TEACHER) for folder in folders])
    write_text(FOLDER / "table.md", text)
    print(text)


def table(repetitions: Sequence[Sequence[Row]]) -> str:
    """Markdown: one line a row, each number as mean ± standard error over the repetitions."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for rows in zip(*repetitions, strict=True):
        columns = zip(*(row.numbers for row in rows), strict=True)
        lines.append((rows[0].name, *map(mean_and_error, columns)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_and_error(values: Sequence[float]) -> str:
    """Percentages: mean, standard error and all values; equal values stand alone."""
    if len(set(values)) == 1:
        return f"{values[0]:.1%}"
    error = stdev(values) / len(values) ** 0.5
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * fmean(values):.1f} ± {100 * error:.1f}% ({each})"


if __name__ == "__main__":
    main()
