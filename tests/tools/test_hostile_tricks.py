"""More programs that attack their sandbox: privileges, links, processes, standard streams.

As in test_hostile_programs.py, the `sandbox` fixture checks after every test that no process or
zombie is left.
"""

import asyncio
import os
import signal
import textwrap
from pathlib import Path

import pytest

from sod_mcore.tools import InfrastructureError, Sandbox, SandboxLimits, SandboxResult
from tests.tools.processes import descendants, executable

pytestmark = pytest.mark.asyncio


async def run(sandbox: Sandbox, program: str, stdin: str = "") -> SandboxResult:
    return await sandbox.run(textwrap.dedent(program), stdin=stdin)


class TestPrivileges:
    async def test_becoming_root(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            import os
            for name, *arguments in (
                ("setuid", 0), ("seteuid", 0), ("setresuid", 0, 0, 0), ("setreuid", 0, 0),
                ("setgid", 0), ("setegid", 0), ("setresgid", 0, 0, 0), ("setgroups", [0]),
                ("setuid", 1000), ("chroot", "/tmp"),
            ):
                try:
                    getattr(os, name)(*arguments)
                    print("allowed:", name, arguments)
                except OSError:
                    pass
            print(os.getresuid(), os.getresgid())
            """,
        )
        assert result.stdout == "(65534, 65534, 65534) (65534, 65534, 65534)\n"

    async def test_setuid_programs(self, sandbox: Sandbox) -> None:
        """Those of this machine, which are visible below /usr, and one of its own."""
        result = await run(
            sandbox,
            """
            import os, shutil, stat, subprocess
            shutil.copy("/usr/bin/id", "/tmp/id")
            os.chmod("/tmp/id", 0o6755)
            print(subprocess.run(["/tmp/id", "-u"], capture_output=True, text=True).stdout.strip())
            for entry in os.scandir("/usr/bin"):
                if entry.stat().st_mode & stat.S_ISUID and entry.name in ("su", "mount", "newgrp"):
                    done = subprocess.run(
                        [entry.path] + (["-c", "id -u"] if entry.name == "su" else []),
                        capture_output=True, text=True, stdin=subprocess.DEVNULL,
                    )
                    if done.returncode == 0 and done.stdout.strip() == "0":
                        print("root by", entry.name)
            """,
        )
        assert (result.stdout, result.status) == ("65534\n", "finished")

    async def test_limits_cannot_be_raised(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            import resource
            for name in ("AS", "NPROC", "CPU", "FSIZE", "NOFILE", "CORE", "MEMLOCK"):
                limit = getattr(resource, "RLIMIT_" + name)
                soft, hard = resource.getrlimit(limit)
                try:
                    resource.setrlimit(limit, (hard + 1, hard + 1))
                    print("raised:", name)
                except ValueError:
                    pass
            """,
        )
        assert (result.stdout, result.stderr) == ("", "")


class TestPaths:
    async def test_links_and_climbing(self, sandbox: Sandbox) -> None:
        repository = Path(__file__).resolve().parents[2]
        targets = [
            repository / "pyproject.toml",
            Path.home() / ".bashrc",
            "/etc/shadow",
            "/etc/passwd",
        ]
        targets += ["/proc/1/root/etc/passwd", "/proc/self/environ", "/proc/1/cwd", "/proc/1/fd/0"]
        targets += ["/proc/sys/kernel/core_pattern", "/dev/fd/0", "/sys/kernel", "/run", "/var/log"]
        result = await run(
            sandbox,
            f"""
            import os
            def visible(path):
                try:
                    os.stat(path)
                    print("visible:", path)
                except OSError:
                    pass
            for index, target in enumerate({[str(target) for target in targets]!r}):
                link = f"/tmp/link{{index}}"
                os.symlink(target, link)
                visible(link)
                visible("/tmp/" + "../" * 20 + target)
                try:
                    os.link(target, link + "-hard")
                    print("linked:", target)
                except OSError:
                    pass
            """,
        )
        assert (result.stdout, result.stderr) == ("", "")

    async def test_writing_through_links(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            import os
            for index, target in enumerate(("/usr/bin/python3", "/etc/passwd", "/bin/new", "/new")):
                os.symlink(target, f"/tmp/{index}")
                for attempt in (
                    lambda path: open(path, "w").close(),
                    lambda path: os.chmod(path, 0o777),
                    lambda path: os.truncate(path, 0),
                    lambda path: os.rename("/tmp/file", target),
                    lambda path: os.mknod(path + "-device", 0o20666, 259),
                ):
                    open("/tmp/file", "w").close()
                    try:
                        attempt(f"/tmp/{index}")
                        print("written:", target)
                    except OSError:
                        pass
            """,
        )
        assert (result.stdout, result.stderr) == ("", "")


class TestProcesses:
    async def test_killing_processes_of_this_machine(self, sandbox: Sandbox) -> None:
        """Ours, our parent's and bubblewrap's numbers mean nothing inside."""
        await asyncio.sleep(0.3)
        ours = [os.getpid(), os.getppid(), *sorted(descendants())]
        result = await run(
            sandbox,
            f"""
            import os, signal
            for pid in {[pid for pid in ours if pid > 20]!r}:
                for target in (pid, -pid):
                    try:
                        os.kill(target, signal.SIGKILL)
                        print("killed:", target)
                    except ProcessLookupError:
                        pass
            print(os.getppid())
            os.kill(0, signal.SIGTERM)
            print("alive")
            """,
        )
        assert result.stdout == "0\nalive\n"
        assert (await sandbox.run("print('next')")).stdout == "next\n"

    async def test_handlers_that_ignore_termination(self, sandbox: Sandbox) -> None:
        """In the program and in children that leave its session and close its streams."""
        result = await run(
            sandbox,
            """
            import os, signal, sys, time
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, lambda *_: None)
            for _ in range(3):
                if os.fork() == 0:
                    os.setsid()
                    for descriptor in range(3):
                        os.close(descriptor)
                    while True:
                        time.sleep(1)
            print("ignoring")
            while True:
                time.sleep(1)
            """,
        )
        assert (result.status, result.stdout) == ("timeout", "ignoring\n")

    async def test_zombies(self, sandbox: Sandbox) -> None:
        """Children that nobody waits for, and orphans that come to the program, which is pid 1."""
        result = await run(
            sandbox,
            """
            import os, time
            for _ in range(10):
                if os.fork() == 0:
                    os._exit(0)
            for _ in range(2):
                if os.fork() == 0:
                    if os.fork() == 0:
                        time.sleep(0.1)
                    os._exit(0)
            time.sleep(0.5)
            print("done")
            """,
        )
        assert (result.stdout, result.return_code) == ("done\n", 0)

    async def test_thread_bomb(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            import threading, time
            started = 0
            try:
                while started < 200:
                    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                    started += 1
            except RuntimeError as error:
                print(started < 16, error)
            """,
        )
        assert result.stdout == "True can't start new thread\n"


class TestStreams:
    async def test_programs_that_read_their_input(self, sandbox: Sandbox) -> None:
        program = """
            import sys
            count = int(input())
            print(sum(int(input()) for _ in range(count)), sys.stdin.read().split())
            try:
                input()
            except EOFError:
                print("end")
        """
        result = await run(sandbox, program, stdin="2\n3\n4\na b\nc")
        assert result.stdout == "7 ['a', 'b', 'c']\nend\n"

    async def test_waiting_for_input_that_never_comes(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("input('more? ')", short_traceback=True)
        assert result.stdout == "more? "
        assert result.stderr == "EOFError: EOF when reading a line\n"

    async def test_input_that_is_no_unicode(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("print(ascii(input()))", stdin="a\udc80b\n")
        assert result.stdout == "'a?b'\n"

    async def test_input_cannot_be_written(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("import os; os.write(0, b'x')", stdin="text")
        assert result.return_code == 1

    @pytest.mark.parametrize("stream", [1, 2])
    async def test_output_that_is_not_text(self, sandbox: Sandbox, stream: int) -> None:
        result = await sandbox.run(
            f"import os\nfor _ in range(8): os.write({stream}, bytes(range(256)) * 16)"
        )
        text = result.stdout if stream == 1 else result.stderr
        assert result.status == "finished"
        assert text == (bytes(range(256)) * 128).decode("utf-8", "replace")

    async def test_signals_of_the_bootstrap_prove_nothing(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("import os; os.write(1, b'RSRS'); os._exit(0)")
        assert (result.stdout, result.status) == ("RSRS", "finished")


def running_sleep() -> list[int]:
    """Sandboxed interpreters whose program has come so far as to start `sleep`."""
    return [
        pid
        for pid in descendants()
        if executable(pid) == "/usr/bin/python3"
        and any(executable(child) == "/usr/bin/sleep" for child in descendants(pid))
    ]


class TestSlots:
    """With one slot only: whatever ends a program or its interpreter, the next call gets it."""

    async def test_dead_workers_leak_no_slot(self, nothing_left_behind: None) -> None:
        limits = SandboxLimits(wall_seconds=60.0)
        async with Sandbox(limits, max_concurrency=1, warm_count=1) as sandbox:
            for _ in range(3):
                task = asyncio.create_task(
                    sandbox.run("import subprocess; subprocess.run(['/usr/bin/sleep', '60'])")
                )
                while not task.done() and not (programs := running_sleep()):
                    await asyncio.sleep(0.05)
                for pid in programs:
                    os.kill(pid, signal.SIGKILL)
                assert (await task).status == "killed"
            assert (await sandbox.run("print('next')")).stdout == "next\n"

    async def test_a_sandbox_that_breaks_leaks_no_slot(
        self, nothing_left_behind: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limits = SandboxLimits(startup_seconds=5.0)
        async with Sandbox(limits, max_concurrency=1, warm_count=1) as sandbox:
            launcher = sandbox._launcher
            assert launcher is not None

            async def fail(_: object) -> object:
                raise OSError("no more processes")

            monkeypatch.setattr(type(launcher), "start", fail)
            failures = 0
            for _ in range(4):
                try:
                    await sandbox.run("print(1)")
                except InfrastructureError:
                    failures += 1
            assert failures >= 2  # the interpreter that was warm already serves one
            monkeypatch.undo()
            outcomes = await asyncio.gather(
                *(sandbox.run("print(1)") for _ in range(3)), return_exceptions=True
            )
            assert isinstance(outcomes[-1], SandboxResult)

    async def test_first_come_first_served(self, nothing_left_behind: None) -> None:
        ended: list[int] = []

        async def call(number: int) -> None:
            await sandbox.run("print(1)")
            ended.append(number)

        async with Sandbox(max_concurrency=1, warm_count=1) as sandbox:
            await asyncio.gather(*(call(number) for number in range(8)))
        assert ended == list(range(8))

    async def test_lower_limits_for_one_program(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("while True: pass", wall_seconds=0.3)
        assert result.status == "timeout"
        assert result.wall_seconds < 3.0
        program = "print(len(bytearray(200 << 20)))"
        assert (await sandbox.run(program, memory_bytes=100 << 20)).return_code == 1
        # Less than Python needs is what Python needs; more than the sandbox's limit is its limit.
        assert (await sandbox.run("print(1)", memory_bytes=1)).stdout == "1\n"
        assert (await sandbox.run("bytearray(1 << 30)", memory_bytes=4 << 30)).return_code == 1
        assert (await sandbox.run(program)).stdout == f"{200 << 20}\n"
