"""The rule that nothing is skipped in CI, tried on a small test suite in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = {
    "test_skip.py": """
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason="no engine here")
def test_skips_by_mark():
    pass

def test_skips_itself():
    pytest.skip("no engine here")

@pytest.mark.xfail(reason="known")
def test_fails_as_expected():
    assert False
""",
    "test_module.py": """
import pytest
pytest.importorskip("no_such_package")

def test_never_seen():
    pass
""",
}


@pytest.mark.parametrize(
    ("ci", "outcome"),
    [
        ("true", "1 failed, 1 passed, 1 xfailed, 2 errors"),
        ("", "1 passed, 3 skipped, 1 xfailed"),
    ],
)
def test_a_skip_fails_only_in_ci(tmp_path: Path, ci: str, outcome: str) -> None:
    (tmp_path / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    for name, text in SUITE.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", "."]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcome in result.stdout, result.stdout
    assert (result.returncode != 0) == (ci == "true")
    assert ("no engine here" in result.stdout) == (ci == "true")
