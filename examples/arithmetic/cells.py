"""The cells of the comparison: one method trained from the cold start of one seed, and measured.

A method is a file of settings in ``cascade/recipes``. A cell is a stage: what exists is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.arithmetic.experiment import CASCADE, Experiment
from examples.arithmetic.stages import Stage
from sod_mcore.config import SodConfig
from sod_mcore.config_file import load_config

SFT = "sft"
"""The method that fine-tunes; all others are runs of ``pretrain_sod.py``."""

METHODS: Mapping[str, str] = {
    SFT: "SFT goes on",
    "grpo": "GRPO",
    "opd": "OPD (uniform weights)",
    "opsd_gt": "OPSD, told the answer",
    "sod": "SOD",
    "sod_floor": "SOD, d_1 at least 0.1",
}
"""Files of settings, in the order of the table, with the names that it shows."""


@dataclass(frozen=True)
class Cell:
    """One method and one seed.

    Attributes:
        method: name of a file in ``recipes``, without its ending.
        experiment: the repetition whose cold start it trains.
        overrides: settings of ``pretrain_sod.py`` that differ from the files, for short trials.
    """

    method: str
    experiment: Experiment
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Everything that the cell leaves behind."""
        return self.experiment.folder / self.method

    @property
    def metrics(self) -> Path:
        """The evaluation of a fine-tuned student, or else the run's metrics."""
        return self.folder / ("evaluation.json" if self.method == SFT else "metrics.jsonl")

    @property
    def teacher(self) -> Path:
        """The model that the teacher's engine must serve.

        A method whose file names the student as teacher gets the cold start of its own seed.
        """
        file = CASCADE / "sod.yaml" if self.method == SFT else self._file
        config = load_config(SodConfig, file)
        assert config.serving is not None
        assert config.serving.teacher is not None
        served = config.serving.teacher.model_path
        return self.experiment.cold_start if served == config.student.model_path else Path(served)

    @property
    def is_scored(self) -> bool:
        """Whether a teacher scores its trajectories, so that there are divergences and weights."""
        return self.method != SFT and load_config(SodConfig, self._file).needs_teacher

    def stage(self, engines: Path) -> Stage:
        """Train and measure, on the engines whose addresses are in the folder ``engines``."""
        served = (*self.overrides, f"serving.directory={engines}")
        commands = self._fine_tuning(served) if self.method == SFT else self._training(served)
        result = self.metrics if self.method == SFT else self.folder / "student"
        return Stage(self.method, result, commands)

    @property
    def _file(self) -> Path:
        return CASCADE / "recipes" / f"{self.method}.yaml"

    def _training(self, served: Sequence[str]) -> list[Sequence[str]]:
        where = (
            f"run.directory={self.folder}",
            f"run.export={self.folder}/student",
            f"serving.teacher.model_path={self.teacher}",
        )
        return [self.experiment.pretrain(*where, *served, config=self._file)]

    def _fine_tuning(self, served: Sequence[str]) -> list[Sequence[str]]:
        student = self.folder / "student"
        where = (
            f"student.model_path={self.experiment.cold_start}",
            f"sft.directory={self.folder}/training",
            f"sft.export={student}",
        )
        updates = f"sft.updates={optimizer_updates(self.overrides)}"
        return [
            self.experiment.train_sft(*where, updates, config=self._file),
            self.experiment.evaluate(student, self.metrics, *served),
        ]


def optimizer_updates(overrides: Sequence[str]) -> int:
    """Updates that every method makes, of about as many conversations each."""
    config = load_config(SodConfig, CASCADE / "sod.yaml", overrides)
    return config.run.steps * config.algorithm.updates_per_step
