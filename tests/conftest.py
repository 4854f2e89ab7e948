"""Where CI=true (`make test`), a skipped test or module fails: what is skipped is not tested."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

Wrapper = Generator[None, pytest.CollectReport, pytest.CollectReport]
TestWrapper = Generator[None, pytest.TestReport, pytest.TestReport]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> TestWrapper:
    """Turn the report of a skipped test into a failure; expected failures stay what they are."""
    report = yield
    if not hasattr(report, "wasxfail"):
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Wrapper:
    """Turn a module that skips itself (``importorskip``) into a collection error."""
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome == "skipped" and os.environ.get("CI") == "true":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, which fails where CI=true: {reason}"
