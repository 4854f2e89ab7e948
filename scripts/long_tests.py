"""The tests marked ``long``, with their results as a table: what ``make test-long`` runs.

    python scripts/long_tests.py [--output FILE] [pytest arguments]

Writes Markdown with date, commit and machine; a test adds a measured value with pytest's
``record_property``. The exit code is pytest's.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
OUTPUT = Path("docs/results/long_tests.md")


@dataclass(frozen=True)
class Result:
    """One test: its name, how it ended, wall seconds, and what it measured."""

    name: str
    outcome: str
    seconds: float
    measured: tuple[tuple[str, str], ...]

    def line(self) -> str:
        """The row of the table."""
        measured = "; ".join(f"{name} {value}" for name, value in self.measured)
        return f"| {self.name} | {self.outcome} | {self.seconds:.0f} | {measured} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run pytest, write the table, return pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=REPOSITORY / OUTPUT)
    options, rest = parser.parse_known_args(arguments)
    commit = describe_commit()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "long", f"--junitxml={report}", *rest]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "CI": "true"}
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode
        results = read_results(report) if report.is_file() else []
    if results:
        options.output.write_text(format_table(results, commit, datetime.now(UTC)))
        print(f"written: {options.output}")
    return code


def read_results(report: Path) -> list[Result]:
    """The tests of a JUnit XML file."""
    return [_read_case(case) for case in ElementTree.parse(report).getroot().iter("testcase")]


def format_table(results: Sequence[Result], commit: str, moment: datetime) -> str:
    """The whole Markdown file."""
    failed = sum(result.outcome != "passed" for result in results)
    seconds = sum(result.seconds for result in results)
    head = (
        f"# Long tests\n\n`make test-long` on {moment:%Y-%m-%d} at commit {commit}: "
        f"{len(results) - failed} passed, {failed} failed in {seconds:.0f} s, on "
        f"{os.cpu_count()} {platform.machine()} cores, Python {platform.python_version()}.\n\n"
        "| test | outcome | seconds | measured |\n|---|---|---|---|\n"
    )
    return head + "".join(f"{result.line()}\n" for result in results)


def describe_commit(repository: Path = REPOSITORY) -> str:
    """The short hash of what is checked out, and whether files were changed since.

    The tables of results do not count: one is written after the other.
    """
    commit = _git(repository, "rev-parse", "--short=7", "HEAD").stdout.strip() or "unknown"
    others = [".", f":!{OUTPUT.parent}"]
    changed = _git(repository, "diff", "--quiet", "HEAD", "--", *others).returncode == 1
    return f"{commit}-dirty" if changed else commit


def _git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def _read_case(case: ElementTree.Element) -> Result:
    bad = [word for word in ("failure", "error", "skipped") if case.find(word) is not None]
    module = case.attrib["classname"].removeprefix("tests.")
    return Result(
        name=f"{module}: {case.attrib['name'].removeprefix('test_').replace('_', ' ')}",
        outcome=bad[0] if bad else "passed",
        seconds=float(case.attrib["time"]),
        measured=tuple(
            (node.attrib["name"].replace("_", " "), node.attrib["value"])
            for node in case.iter("property")
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
