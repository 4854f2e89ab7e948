"""Repetitions of the example: their command lines, and the table over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.arithmetic.experiment import HERE, Experiment
from examples.arithmetic.results import Row
from examples.arithmetic.run import controls, distillation, served, stages
from examples.arithmetic.seeds import table
from sod_mcore.config import SftConfig, SodConfig
from sod_mcore.config_file import load_config
from tests.end_to_end.programs import REPOSITORY

OTHER = Experiment(Path("runs/elsewhere"), seed=7)


def commands(experiment: Experiment) -> list[list[str]]:
    all_stages = [*stages(experiment), distillation(experiment), served(experiment)]
    all_stages += controls(experiment, 60.0)
    return [list(command) for stage in all_stages for command in stage.commands]


@pytest.mark.parametrize(
    ("program", "section"), [("sod.yaml", SodConfig), ("sft_student.yaml", SftConfig)]
)
def test_a_repetition_leaves_nothing_in_the_default_folder(
    program: str, section: type[SodConfig] | type[SftConfig]
) -> None:
    configured = [c for c in commands(OTHER) if str(HERE / program) in c]
    assert configured
    for command in configured:
        start = command.index(str(HERE / program)) + 1
        stop = command.index("--") if "--" in command else len(command)
        overrides = [word for word in command[start:stop] if "=" in word]
        config: SodConfig | SftConfig = load_config(section, REPOSITORY / HERE / program, overrides)
        assert "runs/arithmetic/" not in repr(config)
        assert "runs/elsewhere/" in repr(config)


def test_the_default_needs_no_override() -> None:
    assert Experiment().pretrain()[-1] == str(HERE / "sod.yaml")
    assert Experiment(seed=2).pretrain()[-1] != str(HERE / "sod.yaml")


def test_every_seed_reaches_data_order_and_first_weights() -> None:
    words = [word for command in commands(OTHER) for word in command]
    assert {"run.seed=7", "sft.seed=7", "student.seed=7"} <= set(words)


def test_the_table_gives_mean_and_standard_error() -> None:
    def row(sampled: float) -> Row:
        names = ("temperature_1/accuracy", "temperature_0/accuracy")
        metrics = {f"evaluation/{name}": sampled for name in names}
        return Row("student", {**metrics, "evaluation/temperature_1/failed_call_share": 0.5})

    line = table([[row(0.1)], [row(0.2)], [row(0.6)]]).splitlines()[2]
    # Standard deviation 0.2646 of 3 values: 0.1528.
    assert line.startswith("| student | 30.0 ± 15.3% (10.0, 20.0, 60.0) | ")
    assert line.endswith(" | 50.0% |")
