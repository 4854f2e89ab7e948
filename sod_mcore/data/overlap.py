"""Keeps evaluation problems out of training data."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping


class OverlapError(ValueError):
    """A problem of the evaluation set is also in a training set."""


def normalized_question(text: str) -> str:
    """``text`` without what does not change a question: case, blanks, final punctuation, and
    Unicode variants of a character."""
    compact = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    return compact.rstrip(".?!:;")


def assert_disjoint(train_sets: Mapping[str, Iterable[str]], eval_set: Iterable[str]) -> None:
    """Check that no question of ``eval_set`` is in any of the named training sets.

    Raises:
        OverlapError: names the training set, the number of shared questions, and one of them.
    """
    held_out = {normalized_question(text): text for text in eval_set}
    for name, questions in train_sets.items():
        shared = held_out.keys() & {normalized_question(text) for text in questions}
        if shared:
            raise OverlapError(
                f"{len(shared)} of {len(held_out)} evaluation questions are in training set "
                f"{name!r}, for example {held_out[min(shared)]!r}; remove them from one of the two"
            )
