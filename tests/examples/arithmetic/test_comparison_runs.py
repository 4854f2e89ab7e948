"""The comparison of methods itself: every method of one seed, trained and measured.

It takes the folder of ``python -m examples.arithmetic.compare``, so what was run before is not run
again, and ``make test-long`` adds the other seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from examples.arithmetic.cells import METHODS, Cell
from examples.arithmetic.compare import FOLDER
from examples.arithmetic.comparison_table import read_cell
from examples.arithmetic.experiment import CASCADE, Experiment
from sod_mcore.report.step_lines import read_step_lines
from tests.end_to_end.programs import REPOSITORY, run

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]

SEED = 2
ACCURACY = "evaluation/temperature_1/accuracy"


def test_teachers_and_rewards_mend_the_student(
    record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    compare = [sys.executable, "-m", "examples.arithmetic.compare", "--seeds", str(SEED)]
    run(compare, timeout_seconds=7000)
    experiment = Experiment(FOLDER / f"seed_{SEED}", SEED, CASCADE, shared=FOLDER)
    solved = {}
    for method in METHODS:
        metrics = read_cell(Cell(method, experiment))
        solved[method] = metrics[ACCURACY]
        record_property(f"{method}_solved", f"{metrics[ACCURACY]:.1%}")
        record_property(f"{method}_seconds", f"{metrics['seconds']:.0f}")
    (before,) = [
        line[ACCURACY]
        for line in read_step_lines(Cell("sod", experiment).metrics)
        if line["step"] == 0
    ]
    for method in ("grpo", "opd", "sod"):
        assert solved[method] > before + 0.2, (method, before, solved)
