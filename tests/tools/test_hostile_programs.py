"""Programs that attack their sandbox, each run under the real one.

The `sandbox` fixture also checks, after every test, that no process or zombie is left.
"""

import asyncio
import os
import socket
import textwrap
from pathlib import Path

import pytest

from sod_mcore.tools import Sandbox, SandboxLimits, SandboxResult
from tests.tools.processes import descendants, executable

pytestmark = pytest.mark.asyncio

MEBIBYTE = 1 << 20


async def run(sandbox: Sandbox, program: str) -> SandboxResult:
    return await sandbox.run(textwrap.dedent(program))


class TestResources:
    async def test_fork_bomb(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            import os
            while True:
                try:
                    os.fork()
                except OSError:
                    pass
            """,
        )
        # Sixteen processes spin until the time or the CPU time of the first is over.
        assert result.status in ("timeout", "killed")
        assert (await sandbox.run("print('next')")).stdout == "next\n"

    async def test_number_of_processes(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            import os, time
            started = 0
            try:
                while started < 200:
                    if os.fork() == 0:
                        time.sleep(60)
                    started += 1
            except OSError as error:
                print(started, error.strerror)
            os._exit(0)
            """,
        )
        # os._exit leaves the buffer unwritten, but it is flushed at each line.
        limit = sandbox.limits.processes
        assert result.stdout == f"{limit - 1} Resource temporarily unavailable\n"

    @pytest.mark.parametrize(
        "program", ["bytearray(2 << 30)", "x = []\nwhile True: x.append(bytearray(1 << 20))"]
    )
    async def test_memory_bomb(self, sandbox: Sandbox, program: str) -> None:
        result = await sandbox.run(program)
        assert result.status == "finished"
        assert result.return_code == 1
        assert result.stderr.endswith("MemoryError\n")

    async def test_cpu_time(self, nothing_left_behind: None) -> None:
        limits = SandboxLimits(wall_seconds=60.0, cpu_seconds=1)
        async with Sandbox(limits, warm_count=1) as sandbox:
            result = await sandbox.run("while True: pass")
        assert result.status == "killed"

    async def test_sleeping_over_time(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("print('before')\nimport time\ntime.sleep(60)")
        assert result.status == "timeout"
        assert result.return_code is None
        assert result.stdout == "before\n"
        assert 5.0 <= result.wall_seconds < 15.0

    async def test_ignoring_signals(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            import signal
            for number in range(1, 32):
                if number not in (signal.SIGKILL, signal.SIGSTOP):
                    signal.signal(number, signal.SIG_IGN)
            while True:
                pass
            """,
        )
        assert result.status in ("timeout", "killed")

    @pytest.mark.parametrize(
        "program",
        [
            "while True: print('x' * 100)",
            "print('x' * 100_000_000)",
            "import sys\nwhile True: sys.stderr.write('x' * 1000)",
            "import os\nwhile True: os.write(1, bytes(65536))",
        ],
    )
    async def test_endless_output(self, sandbox: Sandbox, program: str) -> None:
        result = await sandbox.run(program)
        assert result.status == "output_limit"
        assert result.return_code is None
        kept = max(len(result.stdout), len(result.stderr))
        assert kept == sandbox.limits.output_bytes

    async def test_full_disk(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            def fill(path):
                written = 0
                try:
                    with open(path, "wb", buffering=0) as file:
                        while True:
                            written += file.write(bytes(1 << 20))
                except OSError as error:
                    return written >> 20, error.strerror
            print(fill("/tmp/large"), *(fill(f"/tmp/{i}") for i in range(4)))
            print(fill("/dev/shm/large"))
            """,
        )
        large = "(16, 'File too large')"
        assert result.stdout.splitlines() == [
            f"{large} {large} {large} {large} (0, 'No space left on device')",
            "(8, 'No space left on device')",
        ]

    async def test_parser_bombs(self, sandbox: Sandbox) -> None:
        """They end the sandboxed interpreter at most, since nothing is parsed outside."""
        for program in ("(" * 100_000, "-" * 1_000_000 + "1", "a" + ".b" * 1_000_000, "\0"):
            result = await sandbox.run(program, print_last_expression=True)
            assert result.return_code != 0


class TestSight:
    async def test_no_files_of_this_machine(self, sandbox: Sandbox) -> None:
        repository = str(Path(__file__).resolve().parents[2])
        paths = ["/root", "/home", "/etc/shadow", "/etc/passwd", "/etc/hostname", "/proc/1/environ"]
        paths += ["/proc/self", "/sys", "/var", "/run", repository, "/dev/vda", "/dev/mem", "/mnt"]
        result = await run(
            sandbox,
            f"""
            import os
            for path in {paths!r}:
                try:
                    os.stat(path)
                    print("visible:", path)
                except FileNotFoundError:
                    pass
            print(sorted(os.listdir("/tmp")), sorted(os.listdir("/etc")))
            """,
        )
        assert result.stdout == "[] ['ld.so.cache']\n"

    async def test_no_secrets_in_the_environment(
        self, monkeypatch: pytest.MonkeyPatch, nothing_left_behind: None
    ) -> None:
        monkeypatch.setenv("SECRET_TOKEN", "12345")
        async with Sandbox(warm_count=1) as sandbox:
            result = await sandbox.run("import os; print(sorted(os.environ))")
        # PWD is set by bubblewrap to the working directory.
        expected = ["HOME", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PWD"]
        assert result.stdout == f"{expected}\n"

    async def test_nothing_outside_tmp_is_writable(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            import os
            for top in ("/", "/usr", "/usr/bin", "/usr/local", "/lib", "/dev", "/etc", "/opt"):
                try:
                    open(os.path.join(top, "file"), "w").close()
                    print("writable:", top)
                except OSError:
                    pass
            with open("/tmp/file", "w") as file:
                file.write("fine")
            print(open("/tmp/file").read())
            """,
        )
        assert result.stdout == "fine\n"

    async def test_no_descriptors_but_the_standard_ones(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            import os
            for descriptor in range(3, 64):
                try:
                    os.fstat(descriptor)
                    print("open:", descriptor)
                except OSError:
                    pass
            """,
        )
        assert (result.stdout, result.return_code) == ("", 0)

    async def test_nothing_is_carried_over(self, sandbox: Sandbox) -> None:
        await sandbox.run("open('/tmp/note', 'w').write('for the next')")
        result = await sandbox.run("import os; print(os.path.exists('/tmp/note'))")
        assert result.stdout == "False\n"

    async def test_no_network(self, sandbox: Sandbox) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0)
            port = server.getsockname()[1]
            result = await run(
                sandbox,
                f"""
                import socket
                for address in (("127.0.0.1", {port}), ("192.0.2.1", 80)):
                    try:
                        socket.create_connection(address, timeout=1)
                        print("connected", address)
                    except OSError as error:
                        print("refused")
                try:
                    socket.gethostbyname("localhost.localdomain")
                except OSError:
                    print("no names")
                """,
            )
            assert result.stdout == "refused\nrefused\nno names\n"
            with pytest.raises(BlockingIOError):
                server.accept()

    async def test_no_abstract_sockets_of_this_machine(self, sandbox: Sandbox) -> None:
        """Unix sockets get past the filter: here the network namespace alone holds."""
        name = f"\0sandbox-test-{os.getpid()}"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
            server.listen()
            result = await sandbox.run(f"import socket; socket.socket(1).connect({name!r})")
        assert result.stderr.endswith("ConnectionRefusedError: [Errno 111] Connection refused\n")

    async def test_own_namespaces_and_user(self, sandbox: Sandbox) -> None:
        task = asyncio.create_task(
            sandbox.run("import os, time; print(os.getuid()); time.sleep(1)")
        )
        await asyncio.sleep(0.5)
        programs = [pid for pid in descendants() if executable(pid) == "/usr/bin/python3"]
        assert programs
        for pid in programs:
            for kind in ("user", "pid", "net", "ipc", "uts", "mnt"):
                own, theirs = (os.readlink(f"/proc/{p}/ns/{kind}") for p in ("self", pid))
                assert own != theirs, kind
            status = dict(
                line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            )
            assert int(status["CapEff"], 16) == 0
            assert status["NoNewPrivs"] == "1"
            assert status["Seccomp"] == "2"
            # Real root is exempt from the limit of processes.
            assert status["Uid"].split()[0] != "0"
        assert (await task).stdout == "65534\n"


class TestOthers:
    async def test_killing_everything(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            import os, signal
            print(os.getpid(), os.getppid())
            for pid in (1, 2, -1):
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError as error:
                    print(pid, error.strerror)
            print("alone")
            """,
        )
        lines = result.stdout.splitlines()
        assert lines[0] == "1 0"
        assert lines[-1] == "alone"
        assert (await sandbox.run("print(1)")).stdout == "1\n"

    async def test_left_behind_in_the_background(self, sandbox: Sandbox) -> None:
        result = await run(
            sandbox,
            """
            import os, time
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(3600)
                os._exit(0)
            os.wait()
            print("done")
            """,
        )
        assert result.stdout == "done\n"
        assert result.status == "finished"

    async def test_closing_the_pipes_does_not_hide(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("import os, time\nos.close(1); os.close(2); time.sleep(60)")
        assert result.status == "timeout"

    async def test_crash_of_the_interpreter(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("import ctypes; ctypes.string_at(0)")
        assert (result.status, result.return_code) == ("finished", 139)

    async def test_bytes_that_are_not_utf8(self, sandbox: Sandbox) -> None:
        result = await sandbox.run(r"import os; os.write(1, b'a\xff\xfeb'); print('\udc80')")
        assert result.stdout == "a\ufffd\ufffdb\\udc80\n"

    async def test_empty_standard_input(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("import sys; print(repr(sys.stdin.read()))")
        assert result.stdout == "''\n"
