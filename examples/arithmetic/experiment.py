"""One repetition of the example: where it lives, its seed, and the command lines of its programs.

The YAML files beside this one are those of ``make demo``: seed 1 in ``runs/arithmetic``. Any other
repetition overrides their folders and seeds, so that every command can still be typed as printed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path("examples/arithmetic")
TEACHER = HERE / "teacher"
DEFAULT_FOLDER = Path("runs/arithmetic")
DEFAULT_SEED = 1

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@dataclass(frozen=True)
class Experiment:
    """A folder and a seed.

    The seed sets the student's first weights, the order of fine-tuning batches and of prompts, and
    the mini-batches. The problems are the same for all seeds: the committed teacher must not have
    seen the evaluation's questions, and repetitions are compared on equal ones.
    """

    folder: Path = DEFAULT_FOLDER
    seed: int = DEFAULT_SEED

    @property
    def data(self) -> Path:
        """Problems and demonstrations."""
        return self.folder / "data"

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
        return (*_module("examples.arithmetic.make_data"), "--output", str(self.data))

    def make_models(self) -> tuple[str, ...]:
        """Writes the untrained student."""
        command = (*_module("examples.arithmetic.make_models"), "--tokenizer", str(TEACHER))
        return (
            *command,
            "--output",
            str(self.models),
            *self._if_other(f"student.seed={self.seed}"),
        )

    def train_sft(self, *overrides: str) -> tuple[str, ...]:
        """Fine-tunes; without overrides, from copying to the cold start."""
        own = self._if_other(
            f"sft.directory={self.folder}/student_sft",
            f"sft.export={self.cold_start}",
            f"sft.seed={self.seed}",
            f"student.model_path={self.copy}",
            f"data.train={self.data}/sft_student.parquet",
        )
        program = ("--nproc-per-node", "2", "scripts/train_sft.py", str(HERE / "sft_student.yaml"))
        return (*TORCHRUN, *program, *own, *overrides)

    def pretrain(self, *overrides: str) -> tuple[str, ...]:
        """Distils."""
        program = ("--nproc-per-node", "2", "pretrain_sod.py", str(HERE / "sod.yaml"))
        return (*TORCHRUN, *program, *self._sod_overrides(), *overrides)

    def serve(self) -> tuple[str, ...]:
        """Serves student and teacher."""
        serve = _module("sod_mcore.serving")
        return (*serve, str(HERE / "sod.yaml"), *self._sod_overrides())

    def evaluate(self, weights: Path, output: Path, *overrides: str) -> tuple[str, ...]:
        """Measures a Hugging Face folder on the running engines."""
        program = (sys.executable, "scripts/evaluate.py", str(HERE / "sod.yaml"))
        files = ("--weights", str(weights), "--output", str(output))
        return (*program, *files, *self._sod_overrides(), *overrides)

    def run_served(self) -> tuple[str, ...]:
        """The stages that need the engines, once these run."""
        run = (*_module("examples.arithmetic.run"), "--served")
        return (*run, *self._if_other("--seed", str(self.seed), "--folder", str(self.folder)))

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
        """Nothing for the experiment that the YAML files describe."""
        return () if self == Experiment() else overrides


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)
