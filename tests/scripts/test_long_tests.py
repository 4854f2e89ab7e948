"""The table of long tests, from pytest's own report of a real run."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from scripts.long_tests import OUTPUT, describe_commit, format_table, read_results

TESTS = """
import pytest
@pytest.mark.long
def test_a_drill(record_property):
    record_property("seconds_until_gone", 3)
def test_that_fails():
    assert False
"""


def test_the_table_tells_outcomes_and_measured_values(tmp_path: Path) -> None:
    (tmp_path / "test_drills.py").write_text(TESTS)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "test_drills.py"]
    subprocess.run(command, cwd=tmp_path, timeout=60, check=False)
    text = format_table(read_results(report), "1234567", datetime(2026, 1, 2, tzinfo=UTC))
    assert "on 2026-01-02 at commit 1234567: 1 passed, 1 failed" in text
    assert "| test_drills: a drill | passed | 0 | seconds until gone 3 |" in text
    assert "| test_drills: that fails | failure | 0 |  |" in text


def test_the_tables_of_results_do_not_make_a_commit_dirty(tmp_path: Path) -> None:
    table, program = tmp_path / OUTPUT, tmp_path / "program.py"
    table.parent.mkdir(parents=True)
    table.write_text("old")
    program.write_text("old")
    person = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("init", "-q"), ("add", "."), (*person, "commit", "-qm", "first")):
        subprocess.run(["git", *arguments], cwd=tmp_path, timeout=60, check=True)
    commit = describe_commit(tmp_path)
    table.write_text("new")
    assert describe_commit(tmp_path) == commit
    program.write_text("new")
    assert describe_commit(tmp_path) == f"{commit}-dirty"
