"""A program that would crash at its very end keeps its exit code, its output and its handlers."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import atexit, ctypes
from sod_mcore.platform.early_leave import leave_early

# As a C++ destructor that fails: called when the interpreter is gone.
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
atexit.register(print, "registered before")
if {leaves}:
    leave_early(7)
print("said last")
"""


def run(leaves: bool) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(leaves=leaves)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )


def test_it_ends_before_destructors_with_everything_said() -> None:
    done = run(leaves=True)
    assert (done.returncode, done.stdout) == (7, "said last\nregistered before\n"), done.stderr


def test_without_it_the_program_crashes() -> None:
    assert run(leaves=False).returncode < 0
