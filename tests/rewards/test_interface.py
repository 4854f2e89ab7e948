"""Verdicts that would silently become wrong rewards are refused."""

import numpy as np
import pytest

from sod_mcore.rewards import Verdict


@pytest.mark.parametrize("category", ["correct", "Right", "", None])
def test_unknown_categories(category: str) -> None:
    with pytest.raises(ValueError, match=r"category = .*right, wrong, no_answer, bad_format"):
        Verdict(category)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [5.0, -0.1, float("nan"), "1", np.float32(2.0), np.ones(2)])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(ValueError, match=r"share = .*0 to 1"):
        Verdict("right", share=share)


@pytest.mark.parametrize("share", [None, 0.0, 0.25, 1, np.float32(0.25), np.int64(1)])
def test_shares(share: float | None) -> None:
    kept = Verdict("wrong", share=share).share
    assert kept == share
    assert kept is None or type(kept) in (int, float)
