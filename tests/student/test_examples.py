"""Values that no loss can be made of are refused before they reach a kernel, which trusts them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sod_mcore.student.examples import TrainingExample

VOCABULARY = 50


def make_example(**changes: Any) -> TrainingExample:
    """Five tokens of which two carry loss; what stands at the others is never looked at."""
    mask = np.array([False, False, True, False, True])
    nothing = np.where(mask, 0.5, np.nan).astype(np.float32)
    ids = np.where(mask[:, None], [[3, 7, -1]], 99).astype(np.int32)
    logprobs = np.where(mask[:, None], [[-1.0, -np.inf, np.nan]], np.nan).astype(np.float32)
    example = TrainingExample(
        token_ids=np.arange(5, dtype=np.int32),
        loss_mask=mask,
        advantages=nothing,
        token_weights=nothing,
        old_logprobs=nothing,
        teacher_logprobs=nothing,
        teacher_topk_ids=ids,
        teacher_topk_logprobs=logprobs,
    )
    return dataclasses.replace(example, **changes)


def test_sound_values_pass() -> None:
    make_example().check_values(VOCABULARY)
    TrainingExample(np.arange(3, dtype=np.int32), np.array([False, True, True])).check_values(3)


TOPK = np.full((5, 3), -1, np.int32)
LOGPROBS = np.zeros((5, 3), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.array([0, 50, 0, 0, 0], np.int32)}, r"token_ids holds 50; .* \[0, 50\)"),
        ({"token_ids": np.array([-1, 0, 0, 0, 0], np.int32)}, "token_ids holds -1"),
        ({"advantages": np.full(5, np.nan, np.float32)}, "advantages is not finite"),
        ({"teacher_logprobs": np.full(5, -np.inf, np.float32)}, "teacher_logprobs is not finite"),
        ({"teacher_topk_ids": TOPK + 51}, r"teacher_topk_ids holds 50; .* \[-1, 50\)"),
        ({"teacher_topk_ids": TOPK - 1}, "teacher_topk_ids holds -2"),
        ({"teacher_topk_ids": TOPK + 5}, "teacher_topk_ids holds an id twice"),
        ({"teacher_topk_logprobs": LOGPROBS + np.inf}, r"teacher_topk_logprobs holds NaN or \+inf"),
    ],
)
def test_each_fault_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_example(**changes).check_values(VOCABULARY)
