"""The table of sampled trajectories: each turn beside its own tokens, divergence and tool."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sod_mcore.report.trajectory_table import (
    WANDB_COLUMNS,
    TurnRow,
    describe_trajectory,
    format_rows,
    pick_evenly,
    wandb_rows,
)
from tests.report.test_summary import trajectory

DIVERGENCE = np.array([0.5, 0.25, 1.0], np.float32)
WEIGHTS = np.array([1.0, 1.2, 0.5], np.float32)


def test_each_turn_has_its_own_numbers() -> None:
    sampled = trajectory(-1.0, turns=(3, 2, 1), tools=(False, True), end_reason="answer")
    row = describe_trajectory(4, sampled, DIVERGENCE, WEIGHTS)
    assert (row.step, row.group_id, row.reward, row.is_correct) == (4, "g", -1.0, False)
    assert row.turns == (
        TurnRow(1, 3, 0.5, 1.0, "failed"),
        TurnRow(2, 2, 0.25, pytest.approx(1.2), "ok"),  # type: ignore[arg-type]
        TurnRow(3, 1, 1.0, 0.5, "none"),
    )


@pytest.mark.parametrize("absent", [None, np.zeros(0, np.float32)])
def test_an_unscored_trajectory_has_no_divergence(absent: np.ndarray | None) -> None:
    row = describe_trajectory(0, trajectory(1.0, turns=(2, 2)), absent, absent)
    assert all(math.isnan(turn.divergence) and math.isnan(turn.weight) for turn in row.turns)
    assert [turn.tokens for turn in row.turns] == [2, 2]


def test_values_that_do_not_match_the_turns_are_refused() -> None:
    with pytest.raises(ValueError, match="step_weights has 3 values for 2 turns"):
        describe_trajectory(0, trajectory(1.0, turns=(2, 2)), DIVERGENCE[:2], WEIGHTS)


def test_the_text_has_one_aligned_line_a_turn() -> None:
    rows = [
        describe_trajectory(
            1, trajectory(1.0, turns=(3, 2, 1), tools=(True,)), DIVERGENCE, WEIGHTS
        ),
        describe_trajectory(1, trajectory(-1.0, turns=(120,), end_reason="malformed_call")),
    ]
    header, *lines = format_rows(rows).split("\n")
    assert len(lines) == 4
    assert {len(line) - len(line.split()[-1]) for line in lines} == {header.index("tool")}
    assert lines[0].split() == ["g", "+1.00", "answer", "1", "3", "0.5000", "1.0000", "ok"]
    assert lines[1].split() == ["2", "2", "0.2500", "1.2000", "none"]
    assert lines[3].split() == ["g", "-1.00", "malformed_c", "1", "120", "-", "-", "none"]


def test_wandb_rows_fit_the_columns() -> None:
    row = describe_trajectory(1, trajectory(1.0, turns=(3, 2, 1)), DIVERGENCE, WEIGHTS)
    cells = wandb_rows([row])
    assert [len(line) for line in cells] == [len(WANDB_COLUMNS)] * 3
    named = dict(zip(WANDB_COLUMNS, cells[2], strict=True))
    assert (named["turn"], named["tokens"], named["d_k"], named["w_k"]) == (3, 1, 1.0, 0.5)


@pytest.mark.parametrize(
    ("available", "count", "expected"),
    [(10, 3, [0, 3, 6]), (2, 8, [0, 1]), (5, 0, []), (0, 4, []), (4, 4, [0, 1, 2, 3])],
)
def test_the_shown_trajectories_are_spread(available: int, count: int, expected: list[int]) -> None:
    assert pick_evenly(available, count) == expected
