"""The order of items is a function of seed and step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sod_mcore.data import EpochOrder


@settings(deadline=None)
@given(st.integers(1, 30), st.data())
def test_an_epoch_holds_no_item_twice(num_items: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, num_items))
    order = EpochOrder(num_items, seed=data.draw(st.integers(0, 9)))
    steps = num_items // size
    drawn = [i for step in range(steps) for i in order.batch(step, size)]
    assert len(set(drawn)) == len(drawn) == steps * size
    assert set(drawn) <= set(range(num_items))


def test_any_step_can_be_asked_for_alone() -> None:
    in_turn = [EpochOrder(10, seed=7).batch(step, 3) for step in range(9)]
    assert [EpochOrder(10, seed=7).batch(step, 3) for step in reversed(range(9))] == in_turn[::-1]


def test_epochs_and_seeds_differ() -> None:
    first = EpochOrder(50, seed=1).batch(0, 50)
    assert first != EpochOrder(50, seed=1).batch(1, 50)
    assert first != EpochOrder(50, seed=2).batch(0, 50)
    assert first != list(range(50))


@pytest.mark.parametrize("size", [0, 5])
def test_a_batch_must_fit(size: int) -> None:
    with pytest.raises(ValueError, match=f"a batch of {size} items cannot be drawn from 4"):
        EpochOrder(4, seed=0).batch(0, size)
