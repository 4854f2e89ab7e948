"""Verifier for programs: runs the final turn's program on the tests of the data row."""

from sod_mcore.rewards.code.unit_tests import check_tests
from sod_mcore.rewards.code.verifier import CodeVerifier

__all__ = ["CodeVerifier", "check_tests"]
