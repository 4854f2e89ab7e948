"""Step-wise on-policy distillation of a tool-using student (SOD, arXiv 2605.07725).

    torchrun --nproc-per-node N pretrain_sod.py CONFIG [key=value ...] [--record DIR|--replay FILE]

The ranks only train. A pool process lets the student's engine play every prompt several times,
runs its tool calls, checks its answers, and has the teacher score its tokens. From that come one
weight per assistant turn (small where student and teacher disagree more than on the first turn) and
one advantage per token; a clipped policy loss does the rest, and the new weights go back to the
student's engine.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from sod_mcore.algorithm.signals import compute_signals
from sod_mcore.config import SodConfig
from sod_mcore.loop.command_line import read_command_line
from sod_mcore.loop.ending import ending_in_order
from sod_mcore.loop.opening import open_session
from sod_mcore.loop.preflight import check_before_launch
from sod_mcore.loop.session import Session
from sod_mcore.loop.training_examples import make_objective, plan_step, training_examples


def main() -> None:
    """Train until the configured number of steps, a signal or the stop file."""
    config = read_command_line(SodConfig, __doc__, sys.argv[1:], shortcuts=True)
    with ending_in_order(Path(config.run.directory)) as ending:
        prompts = check_before_launch(config)
        session = open_session(config, prompts, ending)
        with session.until_stopped():
            train(session)
        session.finish()


def train(session: Session) -> None:
    """The loop: roll out, weigh, update, publish."""
    config, student = session.config, session.student
    objective = make_objective(config.algorithm)
    session.begin()

    for step in range(session.first_step, config.run.steps):
        # 1. The student plays: trajectories with tool outputs, rewards and teacher log-probs.
        batch = session.collect_trajectories(step)
        plan = plan_step(batch.trajectories, config, step, student.layout.data_parallel_size)

        # 2. Its log-probs before the update give d_k, w_k and the token advantages, all constant.
        old_logprobs = session.old_logprobs(batch, plan)
        signals = session.on_rank_zero(
            partial(compute_signals, batch.trajectories, old_logprobs, config.algorithm)
        )

        # 3. Several optimizer updates, each on whole groups of trajectories.
        updates = [
            student.train_mini_batch(
                training_examples(
                    batch.trajectories, signals, mini_batch, student.layout.data_parallel_rank
                ),
                objective,
            )
            for mini_batch in session.progress_bar(plan.mini_batches, "updates")
        ]

        # 4. The new weights reach the student's engines before it plays again.
        session.publish_weights(step + 1)
        session.report(step, batch, signals, updates)
        session.end_step(step + 1)


if __name__ == "__main__":
    main()
