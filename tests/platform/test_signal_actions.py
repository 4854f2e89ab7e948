"""What a library sets behind Python's back does not stay."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from sod_mcore.platform.signal_actions import kept_signal_actions

SIG_IGN = ctypes.c_void_p(1)


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Numbers that Python's handler of SIGUSR1 was called with."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGUSR1, before)


def ignore_in_c() -> None:
    ctypes.CDLL(None).signal(signal.SIGUSR1, SIG_IGN)


def raise_signal() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_handler_of_python_is_put_back(heard: list[int]) -> None:
    with kept_signal_actions([signal.SIGUSR1]):
        ignore_in_c()
        raise_signal()
        assert heard == []
    raise_signal()
    assert heard == [signal.SIGUSR1]


def test_it_works_from_another_thread(heard: list[int]) -> None:
    def work() -> None:
        with kept_signal_actions([signal.SIGUSR1]):
            ignore_in_c()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    raise_signal()
    assert heard == [signal.SIGUSR1]


def test_what_is_no_signal_is_refused() -> None:
    with pytest.raises(OSError, match="sigaction"), kept_signal_actions([10_000]):
        pass
