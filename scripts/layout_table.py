"""The layouts of the tests and how closely they agree, as a table: docs/results/layouts.md.

    python -m scripts.layout_table [--output FILE] [pytest arguments]

Runs tests/end_to_end/test_layouts.py, which compares ``pretrain_sod.py`` on each layout with eager
torch and with one rank. The exit code is pytest's.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from scripts.long_tests import REPOSITORY, Result, describe_commit, read_results

OUTPUT = REPOSITORY / "docs" / "results" / "layouts.md"
TESTS = "tests/end_to_end/test_layouts.py"
COLUMNS = {
    "layout": "layout",
    "loss to eager": "loss, to eager",
    "gradient to eager": "gradient, to eager",
    "loss to one rank": "loss, to one rank",
    "gradient to one rank": "gradient, to one rank",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run pytest, write the table, return pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options, rest = parser.parse_known_args(arguments)
    commit = describe_commit()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", TESTS, f"--junitxml={report}", *rest]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "CI": "true"}
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode
        results = read_results(report) if report.is_file() else []
    if results:
        options.output.write_text(format_layouts(results, commit, datetime.now(UTC)))
        print(f"written: {options.output}")
    return code


def format_layouts(results: Sequence[Result], commit: str, moment: datetime) -> str:
    """The whole Markdown file; tests that measured no layout are left out."""
    measured = [dict(r.measured) | {"outcome": r.outcome} for r in results]
    rows = [row for row in measured if "layout" in row]
    passed = sum(row["outcome"] == "passed" for row in rows)
    columns = {**COLUMNS, "outcome": "test"}
    lines = [
        "# Agreement of layouts",
        "",
        f"`python -m scripts.layout_table` on {moment:%Y-%m-%d} at commit {commit}: {passed} of "
        f"{len(rows)} passed, on {os.cpu_count()} {platform.machine()} cores, Python "
        f"{platform.python_version()}. Loss: relative difference. Gradient: largest difference of "
        "any entry, as a share of the largest entry of its tensor, over all tensors.",
        "",
        "| " + " | ".join(columns.values()) + " |",
        "|---" * len(columns) + "|",
    ]
    lines += ["| " + " | ".join(row.get(name, "") for name in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
