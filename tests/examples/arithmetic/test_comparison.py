"""The comparison of methods: its settings, its cells and its tables; nothing is trained here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.arithmetic import stages
from examples.arithmetic.cells import METHODS, SFT, Cell, optimizer_updates
from examples.arithmetic.compare import missing, run_cells
from examples.arithmetic.comparison_table import comparison_table, mean_and_error
from examples.arithmetic.experiment import CASCADE, Experiment
from examples.arithmetic.run import stages as cold_start_stages
from sod_mcore.config import EvalConfig, SftConfig, SodConfig
from sod_mcore.config_file import load_config
from sod_mcore.loop.preflight import check_settings
from tests.end_to_end.programs import REPOSITORY

RECIPES = REPOSITORY / CASCADE / "recipes"
TRAINED = [method for method in METHODS if method != SFT]


def make_cell(folder: Path, method: str, seed: int = 1) -> Cell:
    return Cell(method, Experiment(folder / f"seed_{seed}", seed, CASCADE, shared=folder))


def words(cell: Cell) -> list[str]:
    return [word for command in cell.stage(Path("engines")).commands for word in command]


def test_every_method_has_a_file_and_every_file_is_a_recipe() -> None:
    files = {path.stem: path for path in RECIPES.glob("*.yaml")}
    assert set(METHODS) < set(files)
    assert set(files) - set(METHODS) == {"vanilla", "opsd_hint", "teacher_grpo"}
    load_config(SftConfig, files.pop("sft"))
    load_config(EvalConfig, files.pop("vanilla"))
    for path in files.values():
        check_settings(load_config(SodConfig, path))


@pytest.mark.parametrize("method", TRAINED)
def test_methods_differ_in_objective_and_teacher_only(method: str) -> None:
    tree = yaml.safe_load((RECIPES / f"{method}.yaml").read_text())
    assert set(tree) <= {"extends", "algorithm", "teacher", "serving"}
    base = load_config(SodConfig, REPOSITORY / CASCADE / "sod.yaml")
    config = load_config(SodConfig, RECIPES / f"{method}.yaml")
    assert (config.run, config.data, config.optimizer) == (base.run, base.data, base.optimizer)
    assert (config.rollout, config.evaluation) == (base.rollout, base.evaluation)
    for name in ("prompts_per_step", "group_size", "prompts_per_mini_batch"):
        assert getattr(config.algorithm, name) == getattr(base.algorithm, name)


@pytest.mark.parametrize("method", METHODS)
def test_a_cell_stays_in_its_folder(method: str) -> None:
    cell = make_cell(Path("runs/elsewhere"), method, seed=7)
    for command in cell.stage(Path("runs/elsewhere")).commands:
        at = next(i for i, word in enumerate(command) if word.endswith(".yaml"))
        overrides = [w for w in command[at + 1 :] if "=" in w and not w.startswith("--")]
        section: type[Any] = SftConfig if "train_sft" in command[at - 1] else SodConfig
        config = repr(load_config(section, REPOSITORY / command[at], overrides))
        assert "runs/cascade/" not in config
        assert "seed=7" in config


def test_fine_tuning_makes_as_many_updates_as_the_others() -> None:
    assert optimizer_updates(["run.steps=5", "algorithm.prompts_per_step=32"]) == 20
    assert f"sft.updates={optimizer_updates([])}" in words(make_cell(Path("x"), SFT))


def test_cells_of_a_seed_share_the_cold_start() -> None:
    experiment = make_cell(Path("x"), SFT).experiment
    assert str(experiment.cold_start) == str(cold_start_stages(experiment)[-1].result)
    for method in METHODS:
        assert f"student.model_path={experiment.cold_start}" in words(make_cell(Path("x"), method))


def test_a_student_that_teaches_itself_has_the_cold_start_of_its_seed_as_teacher() -> None:
    cells = [make_cell(Path("x"), m, seed) for seed in (1, 2) for m in ("sod", "opsd_gt")]
    own = [cell.experiment.cold_start for cell in cells]
    committed = CASCADE / "teacher"
    assert [cell.teacher for cell in cells] == [committed, own[1], committed, own[3]]
    assert f"serving.teacher.model_path={own[1]}" in words(cells[1])


def finish(commands: list[Sequence[str]], fails_at: str = "") -> Any:
    """Stands for a run: notes the command, and leaves what a stage must leave."""

    def run(command: Sequence[str], passes_on_ctrl_c: bool) -> int:
        commands.append(command)
        if fails_at and any(fails_at in word for word in command):
            return 3
        for word in command:
            key, _, value = word.partition("=")
            if key in ("run.export", "sft.export"):
                Path(value).mkdir(parents=True, exist_ok=True)
        if "--output" in command:
            Path(command[list(command).index("--output") + 1]).write_text("{}")
        return 0

    return run


def test_a_cell_with_a_result_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [make_cell(tmp_path, m, seed) for seed in (1, 2) for m in (SFT, "grpo", "sod")]
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(stages, "run_command", finish(commands, fails_at="seed_2/grpo"))
    with pytest.raises(SystemExit, match="3"):
        run_cells(cells, tmp_path)
    assert missing(cells) == cells[4:]
    # Fine-tuning and its evaluation are two commands.
    assert len(commands) == 4 + 2 + 1

    commands.clear()
    monkeypatch.setattr(stages, "run_command", finish(commands))
    run_cells(cells, tmp_path)
    assert missing(cells) == []
    assert len(commands) == 2


def leave_results(cell: Cell, solved: float, d_2: float) -> None:
    """What a run of ``cell`` would leave: an evaluation, two steps, an evaluation."""
    evaluation = {
        "evaluation/temperature_1/accuracy": solved,
        "evaluation/temperature_0/accuracy": 1.0,
        "evaluation/temperature_1/failed_call_share": 0.5,
    }
    cell.folder.mkdir(parents=True)
    if cell.method == SFT:
        cell.metrics.write_text(json.dumps(evaluation))
        return
    before = {**evaluation, "evaluation/temperature_1/accuracy": 0.25}
    lines: list[Mapping[str, Any]] = [
        {"step": 0, **before},
        {"step": 1, "distillation/d_1": 0.5, "distillation/d_2": d_2, "distillation/d_3": None},
        {"step": 2, "distillation/d_1": 1.5, "distillation/w_k/call_failed": 0.1, **evaluation},
    ]
    cell.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tables_have_mean_and_standard_error_over_seeds(tmp_path: Path) -> None:
    cells = []
    for seed, solved in ((1, 0.4), (2, 0.6), (3, 0.8)):
        for method in (SFT, "grpo", "sod"):
            cells.append(make_cell(tmp_path, method, seed))
            leave_results(cells[-1], solved, d_2=0.1 * seed)
    outcomes, by_turn, by_outcome = (
        part.strip().splitlines() for part in comparison_table(cells).split("\n\n")
    )
    assert [line.split(" | ")[0] for line in outcomes[2:]] == [
        "| teacher (committed)",
        "| cold start",
        "| SFT goes on",
        "| GRPO",
        "| SOD",
    ]
    # Standard deviation 0.2 of 3 values: 0.1155.
    assert outcomes[6].startswith("| SOD | 60.0 ± 11.5% | 100.0 ± 0.0% | ")
    assert outcomes[3].startswith("| cold start | 25.0 ± 0.0% | ")
    assert by_turn[2].startswith("| SOD | 1.000 ± 0.000 | 0.200 ± 0.058 | – | – | ")
    assert len(by_turn) == 3, "without a teacher there is no divergence"
    assert by_outcome[2] == f"| SOD |{' – |' * 5} 0.100 ± 0.000 |{' – |' * 2}"


def test_a_single_seed_has_no_error() -> None:
    assert mean_and_error([0.25], ".1%") == "25.0%"
    assert mean_and_error([], ".1%") == "–"
