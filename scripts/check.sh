#!/usr/bin/env bash
# The checks that every change must pass: lint, formatting, types, and all tests but the long ones.
# Arguments go to pytest: `scripts/check.sh tests/report`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
export CI=true # tests/conftest.py: a skipped test fails
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

$python -m ruff check .
$python -m ruff format --check .
$python -m mypy .
$python -m pytest -q -m "not long" --durations=25 "$@"
