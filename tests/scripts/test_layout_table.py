"""The table of layouts, from what tests leave in pytest's report."""

from __future__ import annotations

from datetime import UTC, datetime

from scripts.layout_table import format_layouts
from scripts.long_tests import Result


def test_rows_are_layouts_and_columns_what_was_measured() -> None:
    measured = (("layout", "TP2, packed"), ("gradient to eager", "6.4e-07"), ("other", "1"))
    results = [
        Result("layouts: float32[tp2]", "passed", 3.0, measured),
        Result("layouts: vocabulary", "passed", 0.0, ()),
    ]
    text = format_layouts(results, "abc1234", datetime(2026, 5, 4, tzinfo=UTC))
    assert "on 2026-05-04 at commit abc1234: 1 of 1 passed" in text
    *_, header, rule, row = text.splitlines()
    assert header.split(" | ")[2] == "gradient, to eager"
    assert rule.count("---") == header.count("|") - 1
    assert row == "| TP2, packed |  | 6.4e-07 |  |  | passed |"
