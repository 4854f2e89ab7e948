"""Measures one model by ``sgl-eval`` and by ``sod_mcore.evaluation``: same engine, same problems.

    python -m venv ENV && ENV/bin/pip install sgl-eval==0.1.3
    .venv/bin/python -m benchmarks.sgl_eval_agreement --sgl-eval ENV/bin/sgl-eval --output DIR

sgl-eval (PyPI, Apache-2.0) asks through the engine's /v1/chat/completions and grades with code of
NeMo-Skills; ours renders the prompt itself, asks through /generate and grades with math-verify. The
problems are sums, and the model is made for this (``sums_model.py``): it solves a part of them, so
that there is something to agree on. Both shares are told with their standard errors over problems,
and how often our grader agrees with sgl-eval's on the very same responses.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sums_model import LARGEST_SUMMAND, question, write_sums_model
from sod_mcore.config import EvalConfig
from sod_mcore.config_file import load_config
from sod_mcore.evaluation.__main__ import PAPER
from sod_mcore.evaluation.engines import ShouldStop, with_engines
from sod_mcore.evaluation.samples import SAMPLES_FILE, read_samples
from sod_mcore.evaluation.statistics import Estimate, average_at_n, mean_estimate
from sod_mcore.rewards import find_grader
from sod_mcore.serving.endpoints import Endpoints

TEMPERATURE, TOP_P, MAX_TOKENS = 1.0, 0.9, 24
TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True)
class Plan:
    """What is measured, where, and by which program of theirs.

    Attributes:
        sgl_eval: its command.
        output: folder of everything that is written.
        problems: sums that are asked.
        samples: of each sum, by each program.
        updates: of the model's training.
    """

    sgl_eval: Path
    output: Path
    problems: int
    samples: int
    updates: int

    @property
    def model(self) -> Path:
        """The Hugging Face folder that is measured."""
        return self.output / "model"

    @property
    def overrides(self) -> list[str]:
        """Settings of our evaluation; the engine of this folder serves both programs."""
        values: dict[str, Any] = {
            "serving.student.model_path": str(self.model.resolve()),
            "serving.student.dtype": "float32",
            "serving.student.context_length": 512,
            "serving.directory": str(self.output / "engine"),
            "evaluation.data": str(self.output / "sums.jsonl"),
            "evaluation.output": str(self.output / "ours"),
            "evaluation.samples": self.samples,
            "evaluation.temperature": TEMPERATURE,
            "evaluation.top_p": TOP_P,
            "evaluation.instructions": "none",
            "evaluation.max_prompt_tokens": 128,
            "rollout.max_turns": 1,
            "rollout.max_response_tokens": MAX_TOKENS,
            "tools.names": [],
            "report.wandb": "disabled",
        }
        return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def main() -> None:
    """Write the problems, run both programs, compare."""
    plan = _read_plan()
    _write_problems(plan)
    if not plan.model.exists():
        write_sums_model(plan.model, plan.updates)
    config = load_config(EvalConfig, PAPER, plan.overrides)

    def work(endpoints: Endpoints, should_stop: ShouldStop) -> None:
        _run_theirs(plan, endpoints)
        _run_ours(plan)

    with_engines(config, work, print)
    report = _compare(plan)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (plan.output / "agreement.json").write_text(text + "\n")
    print(text)


def _write_problems(plan: Plan) -> None:
    """The same questions in both programs' formats, and a prompt that adds nothing to them."""
    rng = random.Random(1)
    plan.output.mkdir(parents=True, exist_ok=True)
    ours, theirs = [], []
    for number in range(plan.problems):
        summands = rng.randint(0, LARGEST_SUMMAND), rng.randint(0, LARGEST_SUMMAND)
        text, answer = question(*summands), str(sum(summands))
        theirs.append({"id": f"sums/{number}", "problem": text, "expected_answer": answer})
        ours.append(
            {
                "data_source": "math_dapo",
                "prompt": [{"role": "user", "content": text}],
                "reward_model": {"ground_truth": answer, "style": "rule"},
                "extra_info": {"index": number},
            }
        )
    _write_lines(plan.output / "sums.jsonl", ours)
    _write_lines(plan.output / "sums_for_sgl_eval.jsonl", theirs)
    (plan.output / "prompt.yaml").write_text('user: "{problem}"\n')


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _run_theirs(plan: Plan, endpoints: Endpoints) -> None:
    options = {
        "--base-url": f"{endpoints.front_door}/v1",
        "--model": "student",
        "--from-dataset": plan.output / "sums_for_sgl_eval.jsonl",
        "--prompt": plan.output / "prompt.yaml",
        "--n-repeats": plan.samples,
        "--temperature": TEMPERATURE,
        "--top-p": TOP_P,
        "--max-tokens": MAX_TOKENS,
        "--out-dir": plan.output / "theirs",
    }
    words = [str(word) for option in options.items() for word in option]
    subprocess.run(
        [str(plan.sgl_eval), "run", "gsm8k", *words], check=True, timeout=TIMEOUT_SECONDS
    )


def _run_ours(plan: Plan) -> None:
    command = [sys.executable, "-m", "sod_mcore.evaluation", *plan.overrides]
    subprocess.run(command, check=True, timeout=TIMEOUT_SECONDS)


def _compare(plan: Plan) -> dict[str, Any]:
    theirs = _their_samples(plan)
    grade = find_grader("math")
    ours_of_theirs = [
        grade(line["generation"], line["expected_answer"], {}).category == "right"
        for line in theirs
    ]
    ours: dict[str, list[bool]] = {}
    for sample in read_samples(plan.output / "ours" / SAMPLES_FILE):
        ours.setdefault(sample.prompt_id, []).append(sample.is_correct)
    by_problem: dict[str, list[bool]] = {}
    for line in theirs:
        by_problem.setdefault(line["id"], []).append(line["symbolic_correct"])
    names = sorted(ours)
    gaps = [float(np.mean(ours[name]) - np.mean(by_problem[name])) for name in names]
    return {
        "problems": len(names),
        "samples": plan.samples,
        "ours": _percent(average_at_n([np.array(ours[name]) for name in names])),
        "sgl_eval": _percent(average_at_n([np.array(by_problem[name]) for name in names])),
        "ours minus sgl_eval, paired by problem": _percent(mean_estimate(gaps)),
        "responses of sgl_eval": len(theirs),
        "of these graded alike": int(
            sum(a == b["symbolic_correct"] for a, b in zip(ours_of_theirs, theirs, strict=True))
        ),
    }


def _their_samples(plan: Plan) -> list[dict[str, Any]]:
    """The lines of the newest run of theirs."""
    run = max((plan.output / "theirs").glob("sgl_eval_gsm8k_*"))
    files = sorted(run.glob("output-rs*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} ± {100 * estimate.standard_error:.1f}%"


def _read_plan() -> Plan:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sgl-eval", type=Path, required=True, metavar="PROGRAM", help="sgl-eval's command")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of everything written")
    add("--problems", type=int, default=128)
    add("--samples", type=int, default=8, help="of each problem, by each program")
    add("--updates", type=int, default=300, help="of the training of a model that is not there yet")
    return Plan(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
