"""The pool of graders against graders that hang, crash, hoard memory and print."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sod_mcore.rewards import GraderPool, PooledVerifier, Verdict, find_grader
from sod_mcore.rewards.worker_handle import GraderTimeoutError, WorkerHandle
from sod_mcore.tools import InfrastructureError
from tests.rewards.misbehaving import misbehave

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT_SECONDS = 3.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[GraderPool]:
    """Two processes, the same for all tests: whatever befell it in one, it must serve the next."""
    async with GraderPool(workers=2, timeout_seconds=LIMIT_SECONDS, memory_bytes=1 << 30) as pool:
        yield pool


def state(process_id: int) -> str:
    """A process's state as the kernel names it: "T" is stopped, "Z" a zombie."""
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


def is_running(process_id: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return state(process_id) != "Z"
    except FileNotFoundError:
        return False


async def worker_id(pool: GraderPool) -> int:
    """The id of an idle grading process."""
    return int((await pool.grade(misbehave, "answer", "", {})).parts["pid"])


async def test_a_hanging_grader_is_killed_and_others_are_not_affected(
    pool: GraderPool, tmp_path: Path
) -> None:
    process_file = tmp_path / "process"
    began = time.monotonic()
    hanging = asyncio.create_task(pool.grade(misbehave, "hang", str(process_file), {}))
    while not process_file.exists():
        await asyncio.sleep(0.01)
    verdicts = [await pool.grade(misbehave, "answer", "", {}) for _ in range(20)]
    assert not hanging.done()
    assert {verdict.category for verdict in verdicts} == {"right"}
    assert await hanging == Verdict("timeout")
    assert LIMIT_SECONDS <= time.monotonic() - began < 6 * LIMIT_SECONDS + 10
    assert not is_running(int(process_file.read_text()))
    assert (await pool.grade(misbehave, "answer", "", {})).category == "right"


async def test_a_grader_out_of_time_is_not_signalled_before_its_end_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """asyncio forgets the exit status of a process that is signalled after its end, and the limit
    would look like a crash."""
    worker = await WorkerHandle.start(1 << 30, cpu_seconds=0.2)
    kill = worker.kill

    async def refuse() -> None:
        raise AssertionError("signalled")

    monkeypatch.setattr(worker, "kill", refuse)
    arguments = pickle.dumps(("burn", "30", {}))
    with pytest.raises(GraderTimeoutError):
        await worker.ask(pickle.dumps(misbehave), arguments)
    await kill()


async def test_the_limit_does_not_count_other_gradings_of_the_process(pool: GraderPool) -> None:
    seconds = LIMIT_SECONDS / 4
    answers = [pool.grade(misbehave, "burn", str(seconds), {}) for _ in range(10)]
    began = time.monotonic()
    assert {verdict.category for verdict in await asyncio.gather(*answers)} == {"right"}
    assert time.monotonic() - began > LIMIT_SECONDS


@pytest.mark.parametrize(
    ("response", "seconds", "category"),
    [
        ("burn", "0.1", "right"),
        ("burn", "60", "timeout"),
        ("one long call", "", "timeout"),
        ("sleep", "1.5", "right"),
        ("sleep", "60", "timeout"),
    ],
)
async def test_the_limit_is_cpu_time_and_six_times_that_by_the_clock(
    response: str, seconds: str, category: str
) -> None:
    async with GraderPool(workers=1, timeout_seconds=0.5) as pool:
        began = time.monotonic()
        assert (await pool.grade(misbehave, response, seconds, {})).category == category
        assert time.monotonic() - began < 30
        assert (await pool.grade(misbehave, "answer", "", {})).category == "right"


async def test_a_grader_that_the_machine_does_not_run_loses_no_time() -> None:
    async with GraderPool(workers=1, timeout_seconds=0.5) as pool:
        process = await worker_id(pool)
        grading = asyncio.create_task(pool.grade(misbehave, "stop", "", {}))
        while state(process) != "T":
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.5)
        os.kill(process, signal.SIGCONT)
        assert (await grading).category == "right"


@pytest.mark.parametrize("response", ["sleep", "long reply"])
async def test_a_busy_event_loop_makes_no_timeout(response: str) -> None:
    """The end of the time and the reply are seen at once, long after the grader ended. A long
    reply does not fit into the pipe."""
    async with GraderPool(workers=1, timeout_seconds=0.2) as pool:
        grading = asyncio.create_task(pool.grade(misbehave, response, "0.6", {}))
        await asyncio.sleep(0.3)
        time.sleep(2.0)
        assert (await grading).category == "right"


async def test_a_verdict_that_is_too_long_is_refused(pool: GraderPool) -> None:
    with pytest.raises(ValueError, match=r"misbehave.*bytes as JSON.*fewer parts"):
        await pool.grade(misbehave, "many parts", "", {})
    assert await worker_id(pool)


@pytest.mark.parametrize(
    ("response", "truth"),
    [("exit", "0"), ("exit", "3"), ("segfault", ""), ("fill memory", "")],
)
async def test_a_process_that_dies_is_the_machines_failure(
    pool: GraderPool, response: str, truth: str
) -> None:
    with pytest.raises(InfrastructureError, match="grading process died"):
        await pool.grade(misbehave, response, truth, {})
    verdicts = await asyncio.gather(*(pool.grade(misbehave, "a", "", {}) for _ in range(5)))
    assert {verdict.category for verdict in verdicts} == {"right"}


async def test_an_idle_process_that_died_is_replaced(pool: GraderPool) -> None:
    victim = await worker_id(pool)
    os.kill(victim, signal.SIGKILL)
    while is_running(victim):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    verdicts = await asyncio.gather(*(pool.grade(misbehave, "a", "", {}) for _ in range(5)))
    assert {verdict.category for verdict in verdicts} == {"right"}


async def test_errors_of_the_grader_are_told_apart(pool: GraderPool) -> None:
    before = {await worker_id(pool) for _ in range(5)}
    with pytest.raises(ValueError, match=r"ground_truth = '\?': not a number"):
        await pool.grade(misbehave, "raise ValueError", "?", {})
    with pytest.raises(InfrastructureError, match=r"misbehave.*KeyError: 'odd'"):
        await pool.grade(misbehave, "raise KeyError", "", {})
    with pytest.raises(InfrastructureError, match="returned float, not a Verdict"):
        await pool.grade(misbehave, "no verdict", "", {})
    assert {await worker_id(pool) for _ in range(5)} & before, "the process goes on"


async def test_what_a_grader_prints_is_not_taken_for_its_reply(
    pool: GraderPool, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (await pool.grade(misbehave, "print", "", {})).prediction == "print"
    assert await worker_id(pool)


async def test_long_texts_and_odd_characters_arrive(pool: GraderPool) -> None:
    odd = "\x00\ud800é\n"
    assert (await pool.grade(misbehave, odd, "", {})).prediction == odd
    verdict = await pool.grade(misbehave, odd * 2_500_000, "", {})
    assert (verdict.category, len(verdict.prediction)) == ("right", 1000)


async def test_two_hundred_at_once_do_not_block_the_event_loop(pool: GraderPool) -> None:
    grader = find_grader("math_verify")
    verifier = PooledVerifier(grader, pool)
    await verifier.verify("\\boxed{x+1}", "1+x", {})
    answers = [verifier.verify(f"\\boxed{{{n} + x}}", f"x + {n // 2 * 2}", {}) for n in range(200)]
    gathered = asyncio.gather(*answers)
    longest_pause, began = 0.0, time.monotonic()
    while not gathered.done():
        before = time.monotonic()
        await asyncio.sleep(0.005)
        longest_pause = max(longest_pause, time.monotonic() - before)
    assert [verdict.category for verdict in gathered.result()] == ["right", "wrong"] * 100
    assert longest_pause < 0.5 * (time.monotonic() - began)


async def test_a_cancelled_grading_frees_its_process(pool: GraderPool, tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    gradings = [asyncio.create_task(pool.grade(misbehave, "hang", str(f), {})) for f in files]
    while not all(file.exists() and file.read_text() for file in files):
        await asyncio.sleep(0.01)
    for grading in gradings:
        grading.cancel()
    await asyncio.gather(*gradings, return_exceptions=True)
    assert not any(is_running(int(file.read_text())) for file in files)
    assert await worker_id(pool)


async def test_closing_kills_everything(tmp_path: Path) -> None:
    pool = GraderPool(workers=1, timeout_seconds=60)
    await pool.start()
    file = tmp_path / "process"
    running = asyncio.create_task(pool.grade(misbehave, "hang", str(file), {}))
    waiting = asyncio.create_task(pool.grade(misbehave, "answer", "", {}))
    while not (file.exists() and file.read_text()):
        await asyncio.sleep(0.01)
    await pool.close()
    for grading in (running, waiting):
        with pytest.raises(InfrastructureError):
            await grading
    assert not is_running(int(file.read_text()))
    with pytest.raises(InfrastructureError, match="closed"):
        await pool.grade(misbehave, "answer", "", {})


async def test_processes_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "process"
    program = (
        "import asyncio, sys\n"
        "from sod_mcore.rewards import GraderPool\n"
        "from tests.rewards.misbehaving import misbehave\n"
        "async def main():\n"
        "    async with GraderPool(workers=1, timeout_seconds=600) as pool:\n"
        "        await pool.grade(misbehave, 'hang', sys.argv[1], {})\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(file)])
    while not (file.exists() and file.read_text()):
        await asyncio.sleep(0.01)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while is_running(int(file.read_text())):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("program", "message"),
    [("/bin/false", "grading process died"), ("/no/such/python", "could not be started.*/no/such")],
)
async def test_a_process_that_cannot_start_is_reported(
    program: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(InfrastructureError, match=message):
        await GraderPool(workers=1, timeout_seconds=1).start()


@pytest.mark.parametrize(("workers", "seconds"), [(0, 1.0), (1, 0.0)])
async def test_settings_that_cannot_work(workers: int, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"workers = {workers}, timeout_seconds = {seconds}"):
        GraderPool(workers=workers, timeout_seconds=seconds)
