"""The layout of micro-batches, against a plain loop over tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sod_mcore.student.examples import TrainingExample
from sod_mcore.student.packing import MicroBatch, Packing, pack_micro_batch, split_by_example
from tests.student.harness import make_examples

CPU = torch.device("cpu")


def flattened(tensor: torch.Tensor) -> list[int]:
    """``[b, s]`` in the order of hidden states ``[s, b, h]`` flattened to ``[s * b, h]``."""
    return tensor.T.flatten().tolist()


@pytest.mark.parametrize("length_multiple", [1, 4])
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_each_loss_row_sees_its_past_and_predicts_its_token(
    packing: Packing, length_multiple: int
) -> None:
    examples = make_examples()
    batch = pack_micro_batch(examples, packing=packing, device=CPU, length_multiple=length_multiple)
    assert batch.token_ids.shape[1] % length_multiple == 0
    assert batch.token_ids.shape == batch.position_ids.shape
    tokens, positions = flattened(batch.token_ids), flattened(batch.position_ids)
    stride = batch.token_ids.shape[0]
    row = 0
    for example in examples:
        for t in range(1, len(example)):
            if not example.loss_mask[t]:
                continue
            cell = int(batch.loss_rows.rows[row])
            assert positions[cell] == t - 1
            seen = [tokens[cell - back * stride] for back in reversed(range(t))]
            assert seen == example.token_ids[:t].tolist()
            assert batch.loss_rows.targets[row] == example.token_ids[t]
            for name in ("advantages", "token_weights", "old_logprobs", "teacher_logprobs"):
                assert getattr(batch.loss_rows, name)[row] == getattr(example, name)[t]
            row += 1
    assert row == len(batch.loss_rows)


def test_packed_row_bounds_are_the_sequences_and_the_padding() -> None:
    examples = make_examples()[:2]
    batch = pack_micro_batch(examples, packing="packed", device=CPU, length_multiple=8)
    assert batch.packed_row is not None
    assert batch.packed_row.cu_seqlens_q.tolist() == [0, 9, 39, 40]
    assert batch.packed_row.max_seqlen_q == 30


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_no_examples_give_padding_without_loss(packing: Packing) -> None:
    batch = pack_micro_batch([], packing=packing, device=CPU, length_multiple=2)
    assert isinstance(batch, MicroBatch)
    assert batch.token_ids.shape == (1, 2)
    assert len(batch.loss_rows) == 0


def test_top_k_candidates_follow_their_token() -> None:
    length, k = 5, 3
    ids = np.arange(length * k, dtype=np.int32).reshape(length, k)
    example = TrainingExample(
        token_ids=np.arange(length, dtype=np.int32),
        loss_mask=np.array([False, False, True, False, True]),
        teacher_topk_ids=ids,
        teacher_topk_logprobs=-ids.astype(np.float32),
    )
    rows = pack_micro_batch([example], packing="packed", device=CPU).loss_rows
    assert rows.teacher_topk_ids is not None
    assert rows.teacher_topk_ids.tolist() == ids[[2, 4]].tolist()
    assert rows.teacher_topk_logprobs is not None
    assert rows.teacher_topk_logprobs.tolist() == (-ids[[2, 4]]).tolist()
    assert rows.advantages is None


def test_a_field_that_one_example_lacks_is_absent() -> None:
    examples = make_examples()
    examples[1] = dataclasses.replace(examples[1], advantages=None)
    rows = pack_micro_batch(examples, packing="packed", device=CPU).loss_rows
    assert rows.advantages is None
    assert rows.old_logprobs is not None


def test_an_example_without_loss_may_lack_what_the_others_have() -> None:
    examples = make_examples()
    unscored = dataclasses.replace(
        examples[1], loss_mask=np.zeros(len(examples[1]), np.bool_), advantages=None
    )
    rows = pack_micro_batch(
        [examples[0], unscored, *examples[2:]], packing="packed", device=CPU
    ).loss_rows
    assert rows.advantages is not None
    assert len(rows.advantages) == len(rows)


def test_values_of_rows_return_as_whole_trajectories() -> None:
    examples = make_examples()
    total = sum(example.num_loss_tokens for example in examples)
    values = np.arange(total, dtype=np.float32)
    wholes = split_by_example(values, examples)
    for whole, example in zip(wholes, examples, strict=True):
        assert len(whole) == len(example)
        assert np.array_equal(np.isnan(whole), ~example.loss_mask)
    kept = np.concatenate([w[e.loss_mask] for w, e in zip(wholes, examples, strict=True)])
    np.testing.assert_array_equal(kept, values)
    with pytest.raises(ValueError, match="values for"):
        split_by_example(values[:-1], examples[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.zeros(3, np.int64)}, r"token_ids is int64\[3\]; it must be int32\[3\]"),
        ({"loss_mask": np.array([True, False, False])}, "nothing predicts the first token"),
        ({"advantages": np.zeros(2, np.float32)}, r"advantages is float32\[2\]"),
        ({"teacher_topk_ids": np.zeros((3, 2), np.int32)}, "given together"),
        (
            {"token_ids": np.zeros(0, np.int32), "loss_mask": np.zeros(0, np.bool_)},
            "at least one token",
        ),
    ],
)
def test_malformed_examples_are_refused(changes: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {
        "token_ids": np.zeros(3, np.int32),
        "loss_mask": np.array([False, True, True]),
    }
    with pytest.raises(ValueError, match=message):
        TrainingExample(**(fields | changes))  # type: ignore[arg-type]
