"""What the student's tests share: tiny models, examples, and launches of real torchrun processes.

A launch costs ten seconds and more, so one launch works off many cases (``rank_program.py``); the
results come back as one ``torch.save`` file a case, written by global rank 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sod_mcore.student.examples import TrainingExample

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH_TIMEOUT_SECONDS = 420
LENGTHS = (9, 30, 2, 17, 23, 12)


@dataclass(frozen=True)
class Case:
    """One layout with what is to be done on it; see ``rank_program.py`` for the actions.

    Attributes:
        model: name of a model folder.
        split: ends of the micro-batches within a replica's examples.
        student: further fields of the student's section.
    """

    name: str
    model: str
    actions: tuple[str, ...]
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    packing: str = "packed"
    precision: str = "fp32"
    distributed_optimizer: bool = False
    split: tuple[int, ...] = (2, 6)
    megatron: Mapping[str, Any] = field(default_factory=dict)
    ddp: Mapping[str, Any] = field(default_factory=dict)
    student: Mapping[str, Any] = field(default_factory=dict)


def write_models(folder: Path) -> None:
    """Random Hugging Face models in float32: ``tied``, ``untied`` and ``qwen2``.

    Their vocabularies need padding; at tensor-parallel size 2 the second rank holds no real column
    of ``untied`` at all.
    """
    common: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
    }
    torch.manual_seed(0)
    qwen3 = {**common, "head_dim": 32}
    models = {
        "tied": Qwen3ForCausalLM(Qwen3Config(vocab_size=300, tie_word_embeddings=True, **qwen3)),
        "untied": Qwen3ForCausalLM(Qwen3Config(vocab_size=120, tie_word_embeddings=False, **qwen3)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(vocab_size=120, tie_word_embeddings=True, **common)),
    }
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases: not the neutral values they start with
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)


def make_examples() -> list[TrainingExample]:
    """Six trajectories of different lengths; one carries no loss; ids below 120."""
    generator = np.random.default_rng(5)
    examples = []
    for index, length in enumerate(LENGTHS):
        mask = generator.random(length) < 0.5
        mask[0] = False
        mask[-1] = index != 2

        def floats(size: int = length) -> np.ndarray[Any, np.dtype[np.float32]]:
            return generator.normal(size=size).astype(np.float32)

        examples.append(
            TrainingExample(
                token_ids=generator.integers(0, 120, length).astype(np.int32),
                loss_mask=mask if index != 2 else np.zeros(length, np.bool_),
                advantages=floats(),
                token_weights=np.abs(floats()),
                old_logprobs=1.5 * floats() - 6,
                teacher_logprobs=floats() - 5,
            )
        )
    return examples


def split_examples(
    examples: Sequence[TrainingExample], case: Case, replica: int, num_replicas: int
) -> list[list[TrainingExample]]:
    """A replica's micro-batches: every ``num_replicas``-th example, cut at ``case.split``."""
    mine = list(examples[replica::num_replicas])
    bounds = (0, *case.split)
    return [mine[a:b] for a, b in pairwise(bounds)]


def launch(cases: Sequence[Case], num_processes: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Run the cases on ``num_processes`` gloo ranks.

    Returns:
        case name -> what global rank 0 reports.
    """
    torch.save(list(cases), folder / "cases.pt")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(num_processes)),
        *("--module", "tests.student.rank_program", str(folder)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LAUNCH_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        raise AssertionError(
            f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-9000:]}"
        )
    return {case.name: torch.load(folder / f"{case.name}.pt", weights_only=False) for case in cases}
