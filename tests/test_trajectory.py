"""Trajectories and recorded batches: what is refused, and that nothing is lost on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sod_mcore.trajectory import (
    FORMAT_VERSION,
    RecordedBatch,
    Trajectory,
    recorded_batch_path,
)

ARRAYS = (
    "token_ids", "loss_mask", "turn_index", "rollout_logprobs", "teacher_logprobs",
    "weight_version", "teacher_topk_ids", "teacher_topk_logprobs",
)  # fmt: skip


def make_trajectory(
    turns: tuple[int, ...] = (2, 3), *, top_k: int = 0, seed: int = 0
) -> Trajectory:
    """Three prompt tokens, then ``turns`` sampled tokens each, with two observed ones between."""
    turn_index = [-1, -1, -1]
    for turn, length in enumerate(turns):
        turn_index += [-1, -1] * (turn > 0) + [turn] * length
    index = np.array(turn_index, np.int16)
    random = np.random.default_rng(seed)
    sampled, size = index >= 0, len(index)
    logprobs = random.normal(-1, 1, (2, size)).astype(np.float32)
    trajectory = Trajectory(
        token_ids=random.integers(0, 2**31 - 1, size, dtype=np.int32),
        loss_mask=sampled,
        turn_index=index,
        rollout_logprobs=np.where(sampled, logprobs[0], np.float32(np.nan)),
        teacher_logprobs=np.where(sampled, logprobs[1], np.float32(np.nan)),
        weight_version=np.where(sampled, np.int32(4), np.int32(-1)).astype(np.int32),
        prompt_length=3,
        group_id=f"prompt {seed}",
        reward=-0.25,
        is_correct=False,
        reward_parts={"outcome": -1.0, "tools": 0.75},
        tool_succeeded=(True, False),
        end_reason="max_turns",
        data_source="chain_sum",
        messages=(
            {"role": "user", "content": "1 + 1? \u00e9 \u4e8c"},
            {"role": "assistant", "content": ""},
        ),
    )
    if not top_k:
        return trajectory
    ids = random.integers(-1, 1000, (size, top_k), dtype=np.int32)
    scores = np.where(ids < 0, np.float32(np.nan), random.normal(size=ids.shape).astype(np.float32))
    return trajectory.with_teacher(trajectory.teacher_logprobs, ids, scores)


def assert_same(left: Trajectory, right: Trajectory) -> None:
    """Equal in every field, arrays to the bit and of the same dtype (NaN equals NaN)."""
    for field in dataclasses.fields(Trajectory):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name in ARRAYS and a is not None:
            assert a.dtype == b.dtype, field.name
            assert a.shape == b.shape, field.name
            assert a.tobytes() == b.tobytes(), field.name
        else:
            assert a == b, field.name
            assert type(a) is type(b), field.name


@pytest.mark.parametrize("top_k", [0, 1, 5])
def test_round_trip_keeps_every_bit(tmp_path: Path, top_k: int) -> None:
    shapes: tuple[tuple[int, ...], ...] = ((2, 3), (1,), (4, 1, 2))
    trajectories = tuple(
        make_trajectory(turns, top_k=top_k, seed=i) for i, turns in enumerate(shapes)
    )
    path = tmp_path / "new folder" / "batch.npz"
    RecordedBatch(trajectories, 7, weight_version=3, num_dropped=2, num_retries=5).save(path)
    loaded = RecordedBatch.load(path)
    assert (loaded.step, loaded.weight_version) == (7, 3)
    assert (loaded.num_dropped, loaded.num_retries) == (2, 5)
    assert len(loaded.trajectories) == 3
    for before, after in zip(trajectories, loaded.trajectories, strict=True):
        assert_same(before, after)


def test_one_unscored_trajectory_does_not_cost_the_others_their_top_k(tmp_path: Path) -> None:
    scored, unscored = make_trajectory(top_k=3), make_trajectory((1,), seed=1)
    path = tmp_path / "batch.npz"
    RecordedBatch((scored, unscored), step=0, weight_version=0).save(path)
    first, second = RecordedBatch.load(path).trajectories
    assert_same(scored, first)
    assert second.teacher_topk_ids is not None
    assert (second.teacher_topk_ids == -1).all()


def test_nan_and_infinity_survive(tmp_path: Path) -> None:
    base = make_trajectory()
    teacher = base.teacher_logprobs.copy()
    teacher[3:6] = (np.nan, -np.inf, 0.0)
    path = tmp_path / "batch.npz"
    RecordedBatch((base.with_teacher(teacher),), step=0, weight_version=0).save(path)
    loaded = RecordedBatch.load(path).trajectories[0]
    assert loaded.teacher_logprobs.tobytes() == teacher.tobytes()
    assert np.isnan(loaded.rollout_logprobs[0])
    assert not loaded.is_scored


def test_a_batch_without_trajectories_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "batch.npz"
    RecordedBatch((), step=1, weight_version=0, num_dropped=8).save(path)
    assert RecordedBatch.load(path) == RecordedBatch((), step=1, weight_version=0, num_dropped=8)


def test_a_prompt_whose_sampling_gave_nothing_round_trips(tmp_path: Path) -> None:
    empty = make_trajectory(())
    assert (empty.num_turns, int(empty.loss_mask.sum())) == (0, 0)
    path = tmp_path / "batch.npz"
    RecordedBatch((empty, make_trajectory()), step=1, weight_version=0).save(path)
    assert_same(RecordedBatch.load(path).trajectories[0], empty)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch.npz"
    header = json.dumps({"format_version": FORMAT_VERSION + 1}).encode()
    np.savez(path, header=np.frombuffer(header, np.uint8), lengths=np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="record the batch again"):
        RecordedBatch.load(path)


def test_a_save_that_dies_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    """A process is killed inside the write; the file under the final name is still the old one."""
    path = recorded_batch_path(tmp_path, 3)
    old = RecordedBatch((make_trajectory(seed=1),), step=3, weight_version=3)
    old.save(path)
    program = f"""
        import os, signal
        from pathlib import Path
        import numpy as np
        import sod_mcore.trajectory as module

        def write_half_and_die(file, **arrays):
            file.write(b"half of an archive")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        module.np.savez = write_half_and_die
        batch = module.RecordedBatch.load(Path({str(path)!r}))
        module.RecordedBatch(batch.trajectories, step=4, weight_version=9).save(Path({str(path)!r}))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=60,
        check=False,
    )
    assert result.returncode == -9
    (left_over,) = (p for p in tmp_path.iterdir() if p != path)
    assert left_over.name.startswith(".")
    assert left_over.read_bytes() == b"half of an archive"
    after = RecordedBatch.load(path)
    assert (after.step, after.weight_version) == (3, 3)
    assert_same(after.trajectories[0], old.trajectories[0])


def test_a_save_that_fails_keeps_the_old_file_and_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "batch.npz"
    old = make_trajectory(seed=1)
    RecordedBatch((old,), step=0, weight_version=0).save(path)
    unwritable = dataclasses.replace(old, messages=({"role": "user", "content": b"not JSON"},))
    with pytest.raises(TypeError):
        RecordedBatch((unwritable,), step=1, weight_version=1).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["batch.npz"]
    assert_same(RecordedBatch.load(path).trajectories[0], old)


def test_turns_and_scores_are_read_off_the_arrays() -> None:
    trajectory = make_trajectory((2, 3))
    assert len(trajectory) == 10
    assert trajectory.num_turns == 2
    assert trajectory.is_scored
    unscored = np.full(10, np.nan, np.float32)
    assert not trajectory.with_teacher(unscored).is_scored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.zeros(10, np.int64)}, r"token_ids is int64\[10\]; it must be int32"),
        ({"turn_index": np.full(10, -1, np.int32)}, "turn_index is int32"),
        ({"rollout_logprobs": np.zeros(10)}, "rollout_logprobs is float64"),
        ({"teacher_logprobs": np.zeros(9, np.float32)}, r"teacher_logprobs is float32\[9\]"),
        ({"weight_version": np.zeros((10, 1), np.int32)}, r"weight_version is int32\[10, 1\]"),
        ({"prompt_length": 0}, "prompt_length is 0"),
        ({"prompt_length": 11}, "prompt_length is 11"),
        ({"prompt_length": 4}, "loss_mask is set inside the prompt"),
        ({"turn_index": np.full(10, -1, np.int16)}, "must mark the same tokens"),
        ({"loss_mask": np.zeros(10, np.bool_)}, "must mark the same tokens"),
        ({"teacher_topk_ids": np.zeros((10, 2), np.int32)}, "must be given together"),
        ({"teacher_topk_ids": np.zeros((10, 2), np.int32),
          "teacher_topk_logprobs": np.zeros((10, 3), np.float32)},
         r"teacher_topk_logprobs is float32\[10, 3\]"),
        ({"teacher_topk_ids": np.zeros((9, 2), np.int32),
          "teacher_topk_logprobs": np.zeros((9, 2), np.float32)}, "teacher_topk_ids is int32"),
    ],
)  # fmt: skip
def test_broken_invariants_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_trajectory((2, 3)), **changes)


def test_recorded_batches_of_a_folder_sort_by_step(tmp_path: Path) -> None:
    names = [recorded_batch_path(tmp_path, step).name for step in (2, 10, 100)]
    assert names == sorted(names) == ["step_000002.npz", "step_000010.npz", "step_000100.npz"]
