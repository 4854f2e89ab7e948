"""The data that flows between the parts: prompts, trajectories, recorded batches.

A trajectory is written once by the rollout, scored once by the teacher, and read by everything
after it. It is kept in whole, unshifted form: entry ``t`` of every array is about token ``t`` given
the tokens before it, so entry 0 never has a log-probability. The shift to model outputs happens in
``student/`` and nowhere else.

A recorded batch is one training step's trajectories on disk. It holds all that the trainer needs,
so parity tests, exact resume and bug reports run without any engine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sod_mcore.files import atomic_file

FORMAT_VERSION = 1

Message = dict[str, Any]
"""One chat message as the chat template takes it: role, content, optional tool_calls."""


@dataclass(frozen=True)
class Prompt:
    """One problem: what the student is asked and what its answer is checked against.

    Attributes:
        messages: the conversation so far (usually one user message).
        ground_truth: the verifier's reference answer.
        data_source: chooses the verifier and, with several teachers, the teacher.
        prompt_id: unique name within its data set; all samples of a prompt form a group.
        extra_info: what the verifier needs besides the ground truth; JSON-serialisable.
    """

    messages: tuple[Message, ...]
    ground_truth: str
    data_source: str
    prompt_id: str
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectory:
    """One sampled conversation of ``T`` tokens, prompt included.

    Attributes:
        token_ids: int32 ``[T]``, exactly what the engine saw and sampled.
        loss_mask: bool ``[T]``, True where the student sampled the token (end-of-turn included).
        turn_index: int16 ``[T]``, the assistant turn (0, 1, ...) of a sampled token, else -1.
        rollout_logprobs: float32 ``[T]``, the engine's log-prob of each sampled token, else NaN.
        teacher_logprobs: float32 ``[T]``, the teacher's log-prob (temperature 1), NaN if unscored.
        weight_version: int32 ``[T]``, version of the weights that sampled the token, else -1.
        prompt_length: number of leading prompt tokens.
        group_id: trajectories with equal ``group_id`` are samples of one prompt.
        reward: total reward, the sum of ``reward_parts`` values that count.
        is_correct: the verifier's verdict.
        category: the verdict in a word ("right", "wrong", "no_answer", "bad_format", "timeout");
            empty in batches that were recorded before there were categories.
        prediction: the answer as the verifier extracted it, for majority votes.
        teacher_topk_ids: int32 ``[T, K]``, -1 where absent; None if not asked for.
        teacher_topk_logprobs: float32 ``[T, K]``, NaN where absent; None if not asked for.
        reward_parts: named parts of the reward, for metrics.
        tool_succeeded: for each tool call in order, whether the program ran without failing.
        end_reason: why the trajectory ended ("answer", "max_turns", "length", "malformed_call").
        data_source: copied from the prompt.
        messages: the conversation as text, for people; never re-tokenised.
    """

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    turn_index: NDArray[np.int16]
    rollout_logprobs: NDArray[np.float32]
    teacher_logprobs: NDArray[np.float32]
    weight_version: NDArray[np.int32]
    prompt_length: int
    group_id: str
    reward: float
    is_correct: bool
    teacher_topk_ids: NDArray[np.int32] | None = None
    teacher_topk_logprobs: NDArray[np.float32] | None = None
    category: str = ""
    prediction: str = ""
    reward_parts: dict[str, float] = field(default_factory=dict)
    tool_succeeded: tuple[bool, ...] = ()
    end_reason: str = "answer"
    data_source: str = ""
    messages: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        for name, dtype in _TOKEN_ARRAYS.items():
            _check_array(name, getattr(self, name), dtype, (len(self.token_ids),))
        if (self.teacher_topk_ids is None) != (self.teacher_topk_logprobs is None):
            raise ValueError("teacher_topk_ids and teacher_topk_logprobs must be given together")
        if self.teacher_topk_ids is not None and self.teacher_topk_logprobs is not None:
            shape = (len(self.token_ids), self.teacher_topk_ids.shape[-1])
            _check_array("teacher_topk_ids", self.teacher_topk_ids, np.int32, shape)
            _check_array("teacher_topk_logprobs", self.teacher_topk_logprobs, np.float32, shape)
        if not 1 <= self.prompt_length <= len(self.token_ids):
            raise ValueError(
                f"prompt_length is {self.prompt_length}; a trajectory of {len(self.token_ids)} "
                "tokens needs a prompt of at least one token and at most all of them"
            )
        if self.loss_mask[: self.prompt_length].any():
            raise ValueError("loss_mask is set inside the prompt, which the student did not sample")
        if not np.array_equal(self.loss_mask, self.turn_index >= 0):
            raise ValueError("loss_mask and turn_index >= 0 must mark the same tokens")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_scored(self) -> bool:
        """Whether the teacher's log-prob of every sampled token is known (it may be -inf)."""
        return not np.isnan(self.teacher_logprobs[self.loss_mask]).any()

    @property
    def num_turns(self) -> int:
        """Number of assistant turns."""
        return int(self.turn_index.max(initial=-1)) + 1

    def with_teacher(
        self,
        teacher_logprobs: NDArray[np.float32],
        topk_ids: NDArray[np.int32] | None = None,
        topk_logprobs: NDArray[np.float32] | None = None,
    ) -> Trajectory:
        """The same trajectory with the teacher's scores."""
        return dataclasses.replace(
            self,
            teacher_logprobs=teacher_logprobs,
            teacher_topk_ids=topk_ids,
            teacher_topk_logprobs=topk_logprobs,
        )


@dataclass(frozen=True)
class RecordedBatch:
    """The trajectories of one training step, in the order in which the step used them.

    Attributes:
        step: number of the step, from 0.
        weight_version: of the weights that are trained.
        num_dropped: trajectories that were given up after all attempts.
        num_retries: attempts beyond the first, of those that were given up too.
    """

    trajectories: tuple[Trajectory, ...]
    step: int
    weight_version: int
    num_dropped: int = 0
    num_retries: int = 0

    @property
    def staleness(self) -> NDArray[np.int32]:
        """Versions by which the weights of each sampled token are behind the batch's, one for each
        token in the loss mask of each trajectory, one after the other."""
        versions = [t.weight_version[t.loss_mask] for t in self.trajectories]
        return self.weight_version - np.concatenate([np.zeros(0, np.int32), *versions])

    def save(self, path: Path) -> None:
        """Write the batch to ``path`` (an ``.npz`` file) so that a crash leaves no half file."""
        arrays = {name: _concatenate(self.trajectories, name) for name in _TOKEN_ARRAYS}
        arrays["lengths"] = np.array([len(t) for t in self.trajectories], dtype=np.int64)
        arrays |= _topk_arrays(self.trajectories)
        header = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "weight_version": self.weight_version,
            "num_dropped": self.num_dropped,
            "num_retries": self.num_retries,
            "trajectories": [_scalars(t) for t in self.trajectories],
        }
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        with atomic_file(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> RecordedBatch:
        """Read a batch written by :meth:`save`.

        Raises:
            ValueError: the file was written by another format version.
        """
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        header = json.loads(arrays.pop("header").tobytes())
        if header["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {header['format_version']}, this program reads "
                f"version {FORMAT_VERSION}: record the batch again"
            )
        bounds = np.cumsum(arrays.pop("lengths"))[:-1]
        parts = {name: np.split(flat, bounds) for name, flat in arrays.items()}
        trajectories = tuple(
            _from_scalars(scalars, {name: part[i] for name, part in parts.items()})
            for i, scalars in enumerate(header["trajectories"])
        )
        return cls(
            trajectories,
            header["step"],
            header["weight_version"],
            header["num_dropped"],
            header.get("num_retries", 0),  # not in files of earlier commits
        )


def recorded_batch_path(directory: Path, step: int) -> Path:
    """Where ``--record`` writes, and ``--replay`` of a folder reads, the batch of ``step``."""
    return directory / f"step_{step:06d}.npz"


_TOKEN_ARRAYS: Mapping[str, Any] = {
    "token_ids": np.int32,
    "loss_mask": np.bool_,
    "turn_index": np.int16,
    "rollout_logprobs": np.float32,
    "teacher_logprobs": np.float32,
    "weight_version": np.int32,
}
_ARRAY_FIELDS = (*_TOKEN_ARRAYS, "teacher_topk_ids", "teacher_topk_logprobs")


def _check_array(name: str, value: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or value.shape != shape:
        raise ValueError(
            f"{name} is {value.dtype}{list(value.shape)}; it must be {np.dtype(dtype)}{list(shape)}"
        )


def _concatenate(trajectories: Sequence[Trajectory], name: str) -> NDArray[Any]:
    parts = [getattr(t, name) for t in trajectories]
    return np.concatenate(parts) if parts else np.zeros(0, _TOKEN_ARRAYS.get(name, np.float32))


def _topk_arrays(trajectories: Sequence[Trajectory]) -> dict[str, NDArray[Any]]:
    """The top-K arrays of all trajectories; absent entries where one was not scored."""
    k = max((t.teacher_topk_ids.shape[1] for t in trajectories if t.teacher_topk_ids is not None),
            default=0)  # fmt: skip
    if k == 0:
        return {}
    ids = [np.full((len(t), k), -1, np.int32) if t.teacher_topk_ids is None else t.teacher_topk_ids
           for t in trajectories]  # fmt: skip
    logprobs = [
        np.full((len(t), k), np.nan, np.float32)
        if t.teacher_topk_logprobs is None
        else t.teacher_topk_logprobs
        for t in trajectories
    ]
    return {
        "teacher_topk_ids": np.concatenate(ids),
        "teacher_topk_logprobs": np.concatenate(logprobs),
    }


def _scalars(trajectory: Trajectory) -> dict[str, Any]:
    return {
        f.name: getattr(trajectory, f.name)
        for f in dataclasses.fields(trajectory)
        if f.name not in _ARRAY_FIELDS
    }


def _from_scalars(scalars: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Trajectory:
    fields: dict[str, Any] = {**arrays, **scalars}
    fields["tool_succeeded"] = tuple(fields["tool_succeeded"])
    fields["messages"] = tuple(fields["messages"])
    return Trajectory(**fields)
