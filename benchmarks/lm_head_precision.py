"""What the precision of the output layer does to log-probs, in the trainer and in the engine.

    .venv/bin/python -m benchmarks.lm_head_precision

A real bf16 model (SmolLM2-135M-Instruct, which `make setup-dev` installs) samples one text, which
trainer and SGLang score with bf16 and with float32 logits. Prints Markdown: the gap between the two
is what a policy ratio against the engine's log-probs starts from.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from sod_mcore.config import OptimizerConfig, StudentConfig
from sod_mcore.platform.megatron import prepare_megatron
from sod_mcore.serving.endpoints import endpoints_path, read_endpoints
from sod_mcore.serving.weights.update import probe_logprobs
from tests.end_to_end.smollm2 import token_logprobs, write_smollm2

NUM_TOKENS = 400
START_SECONDS = 600.0
HEADS: dict[str, dict[str, Any]] = {
    "bf16 logits": {"lm_head": "full"},
    "fp32 logits": {"lm_head": "chunked", "lm_head_dtype": "fp32"},
}
ENGINES = {"bf16 logits": (), "fp32 logits (--enable-fp32-lm-head)": ("--enable-fp32-lm-head",)}
Logprobs = NDArray[np.float32]


def main() -> None:
    """Score one text by every side and print the gaps."""
    prepare_megatron()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_smollm2(folder / "float32")
        model = AutoModelForCausalLM.from_pretrained(folder / "float32", dtype=torch.bfloat16)
        model.save_pretrained(folder / "bf16")
        for path in (folder / "float32").glob("token*"):
            (folder / "bf16" / path.name).write_bytes(path.read_bytes())
        tokens = sample_text(model)
        exact = token_logprobs(model.float(), tokens)
        trainer = {name: trainer_logprobs(folder / "bf16", tokens, HEADS[name]) for name in HEADS}
        engine = {name: engine_logprobs(folder, tokens, ENGINES[name]) for name in ENGINES}

    print(f"SmolLM2-135M in bf16, {len(tokens)} tokens, torch {torch.__version__}; nats\n")
    print("| | | mean gap | largest gap |\n|---|---|---|---|")
    for side, scores in (("trainer", trainer), ("engine", engine)):
        for name, logprobs in scores.items():
            print_row(f"{side}, {name}", "float32 throughout", logprobs, exact)
    for (head, ours), (flag, theirs) in itertools.product(trainer.items(), engine.items()):
        print_row(f"trainer, {head}", f"engine, {flag}", ours, theirs)


def print_row(first: str, second: str, ours: Logprobs, theirs: Logprobs) -> None:
    """Gap between two sides; entry 0 has no log-prob."""
    gap = np.abs(ours[1:] - theirs[1:])
    print(f"| {first} | {second} | {gap.mean():.5f} | {gap.max():.4f} |", flush=True)


def sample_text(model: Any) -> NDArray[np.int32]:
    """A text that the model itself finds likely, as rollouts are."""
    torch.manual_seed(0)
    start = torch.tensor([[model.config.bos_token_id or 1]])
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
    )  # fmt: skip
    return ids[0].numpy().astype(np.int32)


def trainer_logprobs(folder: Path, tokens: NDArray[np.int32], head: dict[str, Any]) -> Logprobs:
    """By the student on one rank."""
    # Megatron-Core must not be imported before prepare_megatron.
    from sod_mcore.student.examples import TrainingExample
    from sod_mcore.student.model_config import ParallelSizes
    from sod_mcore.student.parallel_state import distributed
    from sod_mcore.student.student import Student

    config = StudentConfig(model_path=str(folder), precision="bf16", **head)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with distributed(ParallelSizes(1, 1, 1, 1), seed=0):
        student = Student.build(config, OptimizerConfig(), {}, total_updates=1, seed=0)
        student.load_hf(folder)
        mask = np.arange(len(tokens)) > 0
        values = student.compute_logprobs([[TrainingExample(tokens, mask)]])
    assert values is not None
    return values[0]


def engine_logprobs(
    folder: Path, tokens: NDArray[np.int32], extra_args: tuple[str, ...]
) -> Logprobs:
    """By an SGLang engine in bf16."""
    with served(folder, extra_args) as run_directory:
        endpoints = read_endpoints(run_directory)
        (logprobs,) = probe_logprobs(endpoints, "student", tokens, 300.0)
    return logprobs


@contextmanager
def served(folder: Path, extra_args: tuple[str, ...]) -> Iterator[Path]:
    """The run folder of a running fleet."""
    run_directory = folder / f"run_{len(extra_args)}"
    engine = {
        "model_path": str(folder / "bf16"),
        "dtype": "bfloat16",
        "context_length": 1024,
        "max_total_tokens": 2048,
        "extra_args": list(extra_args),
    }
    tree = {
        "run": {"directory": str(run_directory)},
        "student": {"model_path": str(folder / "bf16")},
        "data": {"train": "not read"},
        "serving": {"device": "cpu", "student": engine, "start_timeout_seconds": START_SECONDS},
    }
    config = folder / "serving.yaml"
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "sod_mcore.serving", str(config)]
    with (folder / "serving.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not endpoints_path(run_directory).exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no engine:\n{(folder / 'serving.log').read_text()}")
                time.sleep(0.2)
            yield run_directory
        finally:
            server.terminate()
            server.wait(timeout=60)


if __name__ == "__main__":
    main()
