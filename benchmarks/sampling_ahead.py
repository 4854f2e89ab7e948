"""What sampling ahead of the trainer gains: trajectories a second, and who waits for whom.

    .venv/bin/python -m benchmarks.sampling_ahead [--steps 10] [--repetitions 2]

The arithmetic example, with its teacher as student, trains in turn with ``rollout.max_staleness``
0 and 1 on the same engines. Printed are medians over the steps of ``timeline/...`` metrics, without
the first two, in which nothing was sampled ahead yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.served_example import CONFIG, REPOSITORY, run_while_served, settings

SKIPPED_STEPS = 2
RUN_SECONDS = 1800.0
METRICS = (
    ("timeline/trajectories_per_second", "trajectories a second", ".2f"),
    ("time/step", "seconds a step", ".1f"),
    ("timeline/trainer_idle_share", "trainer waits", ".0%"),
    ("timeline/rollout_idle_share", "rollout idle", ".0%"),
    ("rollout/staleness", "mean staleness", ".2f"),
)


@dataclass(frozen=True)
class Run:
    """The metrics of the steps of one run that count."""

    staleness: int
    lines: tuple[dict[str, float], ...]

    def median(self, name: str) -> float:
        """Median over the steps."""
        return statistics.median(line[name] for line in self.lines)


def main() -> None:
    """Print one Markdown row for each run, and the ratio of their rates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--served", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.served is not None:
        measure(options.served, options.steps, options.repetitions)
        return
    run_while_served("benchmarks.sampling_ahead", sys.argv[1:], train_prompts=512)


def measure(folder: Path, steps: int, repetitions: int) -> None:
    """Train in turn on engines that run, and print the table."""
    runs = [
        train(folder, steps, staleness, repetition)
        for repetition in range(repetitions)
        for staleness in (0, 1)
    ]
    print("\n| max_staleness | " + " | ".join(label for _, label, _ in METRICS) + " |")
    print("|---" * (len(METRICS) + 1) + "|")
    for run in runs:
        cells = [f"{run.median(name):{form}}" for name, _, form in METRICS]
        print(f"| {run.staleness} | " + " | ".join(cells) + " |")
    pairs = zip(*by_staleness(runs), strict=True)
    ratios = [rate(ahead) / rate(synchronous) for synchronous, ahead in pairs]
    print("\nrate with 1, of that with 0: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))


def train(folder: Path, steps: int, staleness: int, repetition: int) -> Run:
    """One run of ``pretrain_sod.py`` on two ranks."""
    directory = folder / f"staleness_{staleness}_{repetition}"
    changes = (
        *settings(folder),
        f"run.directory={directory}",
        f"run.steps={steps}",
        "run.export=null",
        f"rollout.max_staleness={staleness}",
        "rollout.concurrency=128",
        "algorithm.tis_cap=2.0",
        "optimizer.lr=1e-6",
        "optimizer.min_lr=0.0",
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", "pretrain_sod.py", str(CONFIG)]
    subprocess.run([*command, *changes], cwd=REPOSITORY, check=True, timeout=RUN_SECONDS)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return Run(staleness, tuple(line for line in lines if line["step"] > SKIPPED_STEPS))


def by_staleness(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The synchronous runs, and those that sample ahead."""
    return [r for r in runs if r.staleness == 0], [r for r in runs if r.staleness == 1]


def rate(run: Run) -> float:
    """Trajectories a second."""
    return run.median("timeline/trajectories_per_second")


if __name__ == "__main__":
    main()
