"""Sampled trajectories, turn by turn: how far the student had drifted and what weight that got.

This is the table to read when the weights look wrong: a small ``d_1`` makes all later ones small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sod_mcore.trajectory import Trajectory

ToolOutcome = Literal["ok", "failed", "none"]

WANDB_COLUMNS = (
    "step", "group_id", "data_source", "reward", "is_correct", "end_reason",
    "turn", "tokens", "d_k", "w_k", "tool",
)  # fmt: skip


@dataclass(frozen=True)
class TurnRow:
    """One assistant turn.

    Attributes:
        turn: 1 for the first.
        tokens: tokens that the student sampled.
        divergence: ``d_k``, mean |student - teacher| log-prob in nats; NaN if unscored.
        weight: ``w_k``; NaN if unscored.
        tool: outcome of the turn's tool call.
    """

    turn: int
    tokens: int
    divergence: float
    weight: float
    tool: ToolOutcome


@dataclass(frozen=True)
class TrajectoryRow:
    """One sampled trajectory of training step ``step``."""

    step: int
    group_id: str
    data_source: str
    reward: float
    is_correct: bool
    end_reason: str
    turns: tuple[TurnRow, ...]


def describe_trajectory(
    step: int,
    trajectory: Trajectory,
    step_divergence: NDArray[np.float32] | None = None,
    step_weights: NDArray[np.float32] | None = None,
) -> TrajectoryRow:
    """The row of one trajectory.

    Args:
        step: training step.
        trajectory: what was sampled. Its i-th tool call is that of turn i: a turn runs one call.
        step_divergence: ``d_k`` of each turn, ``[num_turns]``; None or empty if unscored.
        step_weights: ``w_k`` of each turn, likewise.

    Raises:
        ValueError: an array is neither empty nor one value a turn.
    """
    num_turns = trajectory.num_turns
    divergence = _per_turn("step_divergence", step_divergence, num_turns)
    weights = _per_turn("step_weights", step_weights, num_turns)
    turns = tuple(
        TurnRow(
            turn=k + 1,
            tokens=int((trajectory.turn_index == k).sum()),
            divergence=divergence[k],
            weight=weights[k],
            tool=_outcome(trajectory.tool_succeeded, k),
        )
        for k in range(num_turns)
    )
    return TrajectoryRow(
        step=step,
        group_id=trajectory.group_id,
        data_source=trajectory.data_source,
        reward=trajectory.reward,
        is_correct=trajectory.is_correct,
        end_reason=trajectory.end_reason,
        turns=turns,
    )


def pick_evenly(num_available: int, count: int) -> list[int]:
    """``count`` indices spread over ``range(num_available)``, or all of them if there are fewer."""
    count = min(count, num_available)
    return [i * num_available // count for i in range(count)]


def format_rows(rows: Sequence[TrajectoryRow]) -> str:
    """The table as text, one line a turn, for a terminal."""
    lines = ["group            reward  end         turn tokens     d_k     w_k  tool"]
    for row in rows:
        for i, turn in enumerate(row.turns):
            first = i == 0
            lines.append(
                f"{row.group_id[:16] if first else '':<16} "
                f"{f'{row.reward:+.2f}' if first else '':>6}  "
                f"{row.end_reason[:11] if first else '':<11} "
                f"{turn.turn:>4} {turn.tokens:>6} "
                f"{_number(turn.divergence)} {_number(turn.weight)}  {turn.tool}"
            )
    return "\n".join(lines)


def row_as_line(row: TrajectoryRow) -> dict[str, Any]:
    """The row as the content of one JSON line."""
    return asdict(row)


def wandb_rows(rows: Sequence[TrajectoryRow]) -> list[list[Any]]:
    """The cells of a ``wandb.Table`` with :data:`WANDB_COLUMNS`, one row a turn."""
    return [
        [
            row.step, row.group_id, row.data_source, row.reward, row.is_correct, row.end_reason,
            turn.turn, turn.tokens, turn.divergence, turn.weight, turn.tool,
        ]
        for row in rows
        for turn in row.turns
    ]  # fmt: skip


def _per_turn(name: str, values: NDArray[np.float32] | None, num_turns: int) -> list[float]:
    if values is None or len(values) == 0:
        return [math.nan] * num_turns
    if len(values) != num_turns:
        raise ValueError(f"{name} has {len(values)} values for {num_turns} turns")
    return [float(value) for value in values]


def _outcome(tool_succeeded: Sequence[bool], turn: int) -> ToolOutcome:
    if turn >= len(tool_succeeded):
        return "none"
    return "ok" if tool_succeeded[turn] else "failed"


def _number(value: float) -> str:
    return f"{value:7.4f}" if math.isfinite(value) else "      -"
