"""Calls that nobody waits for any more end without a word."""

from __future__ import annotations

import asyncio
import threading

import pytest

from sod_mcore.ray_cluster.daemon_threads import call_in_thread, in_thread

PATIENCE = 30.0


def test_results_and_errors_come_back() -> None:
    assert asyncio.run(in_thread(lambda: 3)) == 3

    def fail() -> None:
        raise OSError("no answer")

    with pytest.raises(OSError, match="no answer"):
        call_in_thread(fail, "test").result(PATIENCE)


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_that_was_given_up_says_nothing(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    said: list[object] = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    may_end = threading.Event()
    threads: list[threading.Thread] = []

    def work() -> None:
        threads.append(threading.current_thread())
        assert may_end.wait(PATIENCE)
        if fails:
            raise OSError("no answer")

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await in_thread(work)

    asyncio.run(give_up())
    may_end.set()
    threads[0].join(PATIENCE)
    assert not said
