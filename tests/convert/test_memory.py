"""A rank needs memory for its own part of the model, not for the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.convert.models import make_model

REPOSITORY = Path(__file__).parents[2]
STAGES = 4


def test_no_rank_ever_holds_the_model(tmp_path: Path) -> None:
    shape = {"vocab_size": 2048, "tie_word_embeddings": False}
    make_model("llama_untied", **shape).save_pretrained(tmp_path / "small")
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    model = make_model("llama_untied", **shape, **large).to(torch.bfloat16)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model")
    del model
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(STAGES)]
    program = ["-m", "tests.convert.memory_program", str(tmp_path), "1", str(STAGES)]
    subprocess.run(
        [sys.executable, *launcher, *program],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=400,
        check=True,
    )
    for rank in range(STAGES):
        peaks = json.loads((tmp_path / f"peak_{rank}.json").read_text())
        for direction, peak in peaks.items():
            assert model_bytes / STAGES / 2 < peak < 0.6 * model_bytes, (rank, direction, peak)
