"""The next item is made while one is used, and by nobody else afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from sod_mcore.serving.weights.prefetch import prefetched

PATIENCE = 30.0


def test_all_items_come_in_order() -> None:
    with prefetched(iter(range(5))) as numbers:
        assert list(numbers) == [0, 1, 2, 3, 4]
    nothings: list[int] = []
    with prefetched(nothings) as nothing:
        assert list(nothing) == []


def test_the_next_one_is_made_while_one_is_used_and_no_more() -> None:
    made = [threading.Event() for _ in range(4)]

    def make() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    with prefetched(make()) as numbers:
        assert next(numbers) == 0
        assert made[1].wait(PATIENCE), "the second is made while the first is in use"
        assert not made[2].wait(0.2), "but not the third"
        assert next(numbers) == 1
        assert made[2].wait(PATIENCE)


def test_an_item_that_is_nothing_ends_nothing() -> None:
    false: list[object] = [None, 0, []]
    with prefetched(false) as items:
        assert list(items) == false


def test_what_making_raises_comes_in_its_turn() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise OSError("the disk is full")

    with prefetched(make()) as numbers:
        assert next(numbers) == 1
        with pytest.raises(OSError, match="the disk is full"):
            next(numbers)


def test_the_rest_can_be_taken_when_using_one_fails() -> None:
    """Gathering is collective: whatever becomes of sending, it must be gone through to its end."""
    may_go_on = threading.Event()

    def make() -> Iterator[int]:
        yield 0
        assert may_go_on.wait(PATIENCE)
        yield from (1, 2, 3)

    items = make()

    def use() -> None:
        with prefetched(items) as numbers:
            next(numbers)
            may_go_on.set()
            raise ConnectionError("the engine is gone")

    with pytest.raises(ConnectionError):
        use()
    assert list(items) == [2, 3], "the thread was at work on 1, and has ended"
