"""What the student trains on: one whole trajectory as plain, unshifted arrays.

Entry ``t`` of every array is about token ``t`` given the tokens before it. The shift to the model's
outputs is made in :mod:`sod_mcore.student.packing` and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PER_TOKEN = {
    "loss_mask": np.bool_,
    "advantages": np.float32,
    "token_weights": np.float32,
    "old_logprobs": np.float32,
    "teacher_logprobs": np.float32,
}


@dataclass(frozen=True)
class TrainingExample:
    """One trajectory of ``T`` tokens with what the loss needs; None where the loss needs it not.

    Attributes:
        token_ids: int32 ``[T]``.
        loss_mask: bool ``[T]``, True where the token carries loss; False at entry 0, which nothing
            predicts.
        advantages: float32 ``[T]``.
        token_weights: float32 ``[T]``, step weights.
        old_logprobs: float32 ``[T]``, log-probs of the policy that the ratio is taken to.
        teacher_logprobs: float32 ``[T]``.
        teacher_topk_ids: int32 ``[T, K]``, -1 where absent.
        teacher_topk_logprobs: float32 ``[T, K]``.

    Raises:
        ValueError: an array has the wrong type or shape, or entry 0 carries loss.
    """

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    advantages: NDArray[np.float32] | None = None
    token_weights: NDArray[np.float32] | None = None
    old_logprobs: NDArray[np.float32] | None = None
    teacher_logprobs: NDArray[np.float32] | None = None
    teacher_topk_ids: NDArray[np.int32] | None = None
    teacher_topk_logprobs: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        _check("token_ids", self.token_ids, np.int32, (length,))
        for name, dtype in _PER_TOKEN.items():
            _check(name, getattr(self, name), dtype, (length,))
        if (self.teacher_topk_ids is None) != (self.teacher_topk_logprobs is None):
            raise ValueError("teacher_topk_ids and teacher_topk_logprobs must be given together")
        if self.teacher_topk_ids is not None:
            shape = (length, self.teacher_topk_ids.shape[-1])
            _check("teacher_topk_ids", self.teacher_topk_ids, np.int32, shape)
            _check("teacher_topk_logprobs", self.teacher_topk_logprobs, np.float32, shape)
        if length == 0:
            raise ValueError("token_ids is empty; an example needs at least one token")
        if self.loss_mask[0]:
            raise ValueError("loss_mask[0] is True, but nothing predicts the first token")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return int(np.count_nonzero(self.loss_mask))

    def check_values(self, vocab_size: int) -> None:
        """Refuse values that no loss can be made of; the operations on logits trust them.

        Raises:
            ValueError: an id outside the vocabulary, candidates twice in a row, or a number that
                is not finite where the token carries loss.
        """
        _check_ids("token_ids", self.token_ids, vocab_size, lowest=0)
        for name in _PER_TOKEN:
            values = getattr(self, name)
            if values is not None and not np.isfinite(values[self.loss_mask]).all():
                raise ValueError(f"{name} is not finite at a token that carries loss")
        if self.teacher_topk_ids is None or self.teacher_topk_logprobs is None:
            return
        ids = self.teacher_topk_ids[self.loss_mask]
        _check_ids("teacher_topk_ids", ids, vocab_size, lowest=-1)
        ordered = np.sort(ids, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise ValueError("teacher_topk_ids holds an id twice for one token")
        logprobs = self.teacher_topk_logprobs[self.loss_mask][ids >= 0]
        if (np.isnan(logprobs) | np.isposinf(logprobs)).any():
            raise ValueError("teacher_topk_logprobs holds NaN or +inf at an id that is present")


def _check(name: str, value: NDArray[Any] | None, dtype: Any, shape: tuple[int, ...]) -> None:
    if value is not None and (value.dtype != dtype or value.shape != shape):
        raise ValueError(
            f"{name} is {value.dtype}{list(value.shape)}; it must be {np.dtype(dtype)}{list(shape)}"
        )


def _check_ids(name: str, ids: NDArray[np.int32], vocab_size: int, *, lowest: int) -> None:
    outside = ids[(ids < lowest) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"{name} holds {outside[0]}; ids must lie in [{lowest}, {vocab_size}). Do student and "
            "data share one tokenizer?"
        )
