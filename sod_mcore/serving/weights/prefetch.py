"""Makes the next item while one is used: a bucket of weights is gathered while another is sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def prefetched(items: Iterable[Item]) -> Iterator[Iterator[Item]]:
    """The same items in the same order, each made by one thread while the one before is used.

    Two items exist at a time, and a third until the caller lets go of the one before. At the end of
    the block nothing is made any more: what is left of ``items`` can be taken by the caller then.

    Raises:
        Exception: what making an item raises, when that item's turn comes.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        yield _one_ahead(iter(items), thread)


def _one_ahead(items: Iterator[Item], thread: ThreadPoolExecutor) -> Iterator[Item]:
    following = thread.submit(_up_to_one, items)
    while item := following.result():
        following = thread.submit(_up_to_one, items)
        yield item[0]


def _up_to_one(items: Iterator[Item]) -> list[Item]:
    return list(islice(items, 1))
