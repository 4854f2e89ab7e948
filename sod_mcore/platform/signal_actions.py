"""Keeps what a process does at a signal while a library is called that changes it in C.

``signal.signal`` cannot undo that: it works in the main thread only, and Python does not see what
was set behind its back.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_ACTION_BYTES = 256
"""More than ``struct sigaction`` has on Linux."""


@contextmanager
def kept_signal_actions(numbers: Iterable[int]) -> Iterator[None]:
    """Put the actions of these signals back at the end, from whichever thread.

    Raises:
        OSError: a number is no signal.
    """
    kept = {number: _action_of(number) for number in numbers}
    try:
        yield
    finally:
        for number, action in kept.items():
            _sigaction(number, action, None)


def _action_of(number: int) -> ctypes.Array[ctypes.c_char]:
    action = ctypes.create_string_buffer(_ACTION_BYTES)
    _sigaction(number, None, action)
    return action


def _sigaction(number: int, new: Any, old: Any) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.sigaction(number, new, old) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"sigaction({number}): {os.strerror(code)}")
