"""One repetition of the example: where it lives, its seed, and the command lines of its programs.

The YAML files beside this one are those of ``make demo``: seed 1 in ``runs/arithmetic``. Any other
repetition, or another recipe (a folder of such files and their teacher), overrides folders and
seeds, so that every command can still be typed as printed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path("examples/arithmetic")
CASCADE = HERE / "cascade"
DEFAULT_FOLDER = Path("runs/arithmetic")
DEFAULT_SEED = 1

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def recipe_teacher(recipe: Path) -> Path:
    """The committed teacher of a recipe's folder."""
    return recipe / "teacher"


TEACHER = recipe_teacher(HERE)


@dataclass(frozen=True)
class Experiment:
    """A folder, a seed and a recipe.

    The seed sets the student's first weights, the order of fine-tuning batches and of prompts, and
    the mini-batches. The problems are the same for all seeds: the committed teacher must not have
    seen the evaluation's questions, and repetitions are compared on equal ones.
    """

    folder: Path = DEFAULT_FOLDER
    seed: int = DEFAULT_SEED
    recipe: Path = HERE
    """Folder of the YAML files and of the committed teacher."""
    shared: Path | None = None
    """Folder of the data, where repetitions share them; None keeps them in ``folder``."""

    @property
    def teacher(self) -> Path:
        """The committed teacher."""
        return recipe_teacher(self.recipe)

    @property
    def data(self) -> Path:
        """Problems and demonstrations."""
        return (self.shared or self.folder) / "data"

    @property
    def models(self) -> Path:
        """The untrained student."""
        return self.folder / "models"

    @property
    def copy(self) -> Path:
        """The student that has practised copying."""
        return self.folder / "student_copy"

    @property
    def cold_start(self) -> Path:
        """The student that distillation starts from."""
        return self.folder / "cold_start"

    @property
    def student(self) -> Path:
        """The distilled student."""
        return self.folder / "student"

    @property
    def controls(self) -> Path:
        """Everything that the controls leave behind."""
        return self.folder / "controls"

    def make_data(self) -> tuple[str, ...]:
        """Writes problems and demonstrations."""
        make = _module("examples.arithmetic.make_data")
        return (*make, "--output", str(self.data), *self._recipe_option())

    def make_models(self) -> tuple[str, ...]:
        """Writes the untrained student."""
        make = (*_module("examples.arithmetic.make_models"), "--tokenizer", str(self.teacher))
        where = ("--output", str(self.models), *self._recipe_option())
        return (*make, *where, *self._if_other(f"student.seed={self.seed}"))

    def train_sft(self, *overrides: str, config: Path | None = None) -> tuple[str, ...]:
        """Fine-tunes; without overrides, from copying to the cold start."""
        file = config or self.recipe / "sft_student.yaml"
        own = self._if_other(
            f"sft.directory={self.folder}/student_sft",
            f"sft.export={self.cold_start}",
            f"sft.seed={self.seed}",
            f"student.model_path={self.copy}",
            f"data.train={self.data}/sft_student.parquet",
        )
        program = ("--nproc-per-node", "2", "scripts/train_sft.py", str(file))
        return (*TORCHRUN, *program, *own, *overrides)

    def pretrain(self, *overrides: str, config: Path | None = None) -> tuple[str, ...]:
        """Distils, or trains as another file of settings says."""
        program = ("--nproc-per-node", "2", "pretrain_sod.py", str(config or self._sod))
        return (*TORCHRUN, *program, *self._sod_overrides(), *overrides)

    def serve(self, *overrides: str) -> tuple[str, ...]:
        """Serves student and teacher."""
        serve = _module("sod_mcore.serving")
        return (*serve, str(self._sod), *self._sod_overrides(), *overrides)

    def evaluate(self, weights: Path, output: Path, *overrides: str) -> tuple[str, ...]:
        """Measures a Hugging Face folder on the running engines."""
        program = (sys.executable, "scripts/evaluate.py", str(self._sod))
        files = ("--weights", str(weights), "--output", str(output))
        return (*program, *files, *self._sod_overrides(), *overrides)

    def run_served(self) -> tuple[str, ...]:
        """The stages that need the engines, once these run."""
        run = (*_module("examples.arithmetic.run"), "--served")
        return (*run, *self._if_other("--seed", str(self.seed), "--folder", str(self.folder)))

    @property
    def _sod(self) -> Path:
        return self.recipe / "sod.yaml"

    def _recipe_option(self) -> tuple[str, ...]:
        return () if self.recipe == HERE else ("--recipe", str(self.recipe / "recipe.yaml"))

    def _sod_overrides(self) -> tuple[str, ...]:
        return self._if_other(
            f"run.directory={self.folder}/sod",
            f"run.export={self.student}",
            f"run.seed={self.seed}",
            f"student.model_path={self.cold_start}",
            f"data.train={self.data}/train.parquet",
            f"evaluation.data={self.data}/eval.parquet",
            f"serving.directory={self.folder}",
            f"serving.student.model_path={self.cold_start}",
        )

    def _if_other(self, *overrides: str) -> tuple[str, ...]:
        """Nothing for the experiment that the YAML files beside this one describe."""
        return () if self == Experiment() else overrides


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)
