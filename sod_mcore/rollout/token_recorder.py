"""Collects one conversation's tokens, exactly as the engine saw and sampled them.

Text is never turned into tokens again: what was sampled is appended as ids, and what the student
did not sample (the prompt, observations) is appended with mask 0. So the loss mask is exact by
construction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sod_mcore.trajectory import Trajectory


class TokenRecorder:
    """Grows the per-token arrays of one trajectory."""

    def __init__(self, prompt_ids: NDArray[np.int32]) -> None:
        self.prompt_length = len(prompt_ids)
        self.num_turns = 0
        self._token_ids = [prompt_ids.astype(np.int32)]
        self._turn_index = [np.full(len(prompt_ids), -1, np.int16)]
        self._logprobs = [np.full(len(prompt_ids), np.nan, np.float32)]
        self._weight_version = [np.full(len(prompt_ids), -1, np.int32)]
        self._length = len(prompt_ids)

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """All tokens so far, int32 ``[T]``."""
        return np.concatenate(self._token_ids)

    @property
    def response_length(self) -> int:
        """Tokens after the prompt, observations included."""
        return self._length - self.prompt_length

    def append_turn(
        self,
        token_ids: NDArray[np.int32],
        logprobs: NDArray[np.float32],
        weight_version: NDArray[np.int32],
    ) -> None:
        """Append one sampled assistant turn (its end-of-turn token included); arrays of ``[n]``."""
        n = len(token_ids)
        if logprobs.shape != (n,) or weight_version.shape != (n,):
            raise ValueError(
                f"a turn of {n} tokens came with {logprobs.shape} log-probs and "
                f"{weight_version.shape} weight versions"
            )
        self._append(token_ids, np.full(n, self.num_turns, np.int16), logprobs, weight_version)
        self.num_turns += 1

    def append_observation(self, token_ids: NDArray[np.int32]) -> None:
        """Append tokens that the student reads but did not sample; int32 ``[n]``."""
        n = len(token_ids)
        self._append(
            token_ids,
            np.full(n, -1, np.int16),
            np.full(n, np.nan, np.float32),
            np.full(n, -1, np.int32),
        )

    def to_trajectory(self, **fields: Any) -> Trajectory:
        """The recorded tokens, still unscored, with the given further fields of Trajectory."""
        turn_index = np.concatenate(self._turn_index)
        return Trajectory(
            token_ids=self.token_ids,
            loss_mask=turn_index >= 0,
            turn_index=turn_index,
            rollout_logprobs=np.concatenate(self._logprobs),
            teacher_logprobs=np.full(self._length, np.nan, np.float32),
            weight_version=np.concatenate(self._weight_version),
            prompt_length=self.prompt_length,
            **fields,
        )

    def _append(
        self,
        token_ids: NDArray[np.int32],
        turn_index: NDArray[np.int16],
        logprobs: NDArray[np.float32],
        weight_version: NDArray[np.int32],
    ) -> None:
        self._token_ids.append(token_ids.astype(np.int32))
        self._turn_index.append(turn_index)
        self._logprobs.append(logprobs.astype(np.float32))
        self._weight_version.append(weight_version.astype(np.int32))
        self._length += len(token_ids)
