"""A real SLURM of three nodes on this machine, in a temporary folder, gone without a trace after.

The daemons are Debian's; configuration, ports, keys and logs are our own, and everything listens on
127.0.0.1. The nodes differ by name only: each daemon runs in a namespace of its own for its host
name, and sees an /etc/hosts in which the names of all nodes are this machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from sod_mcore.serving.fleet.launch import free_port
from tests.serving.processes import descendants, wait_until_gone

NODES = ("n0", "n1", "n2")
COMMAND_SECONDS = 30.0
START_SECONDS = 60.0

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
# Without these the daemons listen on every interface.
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has run out, two minutes by default; 5 s is least.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=30
# scontrol still knows an ended job for that many seconds.
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=60
SlurmdTimeout=300
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
PropagateResourceLimits=NONE
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 State=UP
"""
NODE = "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"


@dataclass(frozen=True)
class Job:
    """What ``scontrol show job`` says about a job.

    Attributes:
        state: such as PENDING, RUNNING, COMPLETED, FAILED.
        restarts: how often it was requeued.
        exit_code: exit code of the batch script, once it has ended.
    """

    number: int
    state: str
    restarts: int
    exit_code: int

    @property
    def has_ended(self) -> bool:
        return self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@dataclass
class SlurmCluster:
    """Starts on entry, ends with all its jobs on exit."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sod-slurm-")))
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> Self:
        assert os.geteuid() == 0, "namespaces for the nodes' names need root"
        assert shutil.which("slurmctld", path=_path()), "SLURM is missing: make setup-slurm"
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def submit(self, script: Path) -> int:
        """``sbatch``; returns the job's number."""
        return int(self._command("sbatch", "--parsable", str(script)))

    def job(self, number: int) -> Job:
        """The state of a job."""
        words = self._command("scontrol", "--oneliner", "show", "job", str(number)).split()
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        return Job(
            number,
            fields["JobState"],
            int(fields["Restarts"]),
            int(fields["ExitCode"].split(":")[0]),
        )

    def signal_batch_shell(self, number: int) -> None:
        """What ``--signal=B:USR1@SECONDS`` does before the time limit, at once."""
        self._command("scancel", "--batch", "--signal=USR1", str(number))

    def wait(self, number: int, until: Callable[[Job], bool], seconds: float) -> Job:
        """Ask until ``until`` holds; fails after ``seconds``. ``sbatch --wait`` asks too rarely."""
        deadline = time.monotonic() + seconds
        while not until(job := self.job(number)):
            assert time.monotonic() < deadline, f"{job}\n{self.logs()}"
            time.sleep(0.5)
        return job

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        files = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"--- {f.name}\n" + f.read_text()[-1500:] for f in files)

    def _command(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")},
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def _start(self) -> None:
        self._write_files()
        munge = self.folder / "munge"
        self._daemon(
            "munge",
            *("munged", "--foreground", f"--key-file={self.folder}/key/munge.key"),
            *(f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"),
            f"--log-file={self.folder}/log/munged.log",
        )
        _wait_until((munge / "socket").exists, "munged does not listen")
        configuration = str(self.folder / "slurm.conf")
        self._daemon("localhost", "slurmctld", "-D", "-c", "-f", configuration)
        for name in NODES:
            self._daemon(name, "slurmd", "-D", "-N", name, "-f", configuration)
        _wait_until(self._all_idle, "the nodes are not idle")

    def _write_files(self) -> None:
        self.folder.chmod(0o755)  # munge wants every folder above its socket to be open to all
        for name in ("key", "munge", "state", "run", "log", *(f"spool/{n}" for n in NODES)):
            (self.folder / name).mkdir(parents=True, mode=0o700 if name == "key" else 0o755)
        key = self.folder / "key" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {' '.join(NODES)}\n")
        ports = free_ports(len(NODES) + 1)
        nodes = [NODE.format(name=n, port=p) for n, p in zip(NODES, ports[1:], strict=True)]
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder, controller_port=ports[0], nodes="\n".join(nodes)
            )
        )

    def _daemon(self, host: str, *command: str) -> None:
        """Start one daemon in namespaces of its own for the host name and /etc/hosts."""
        prepare = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        self._daemons.append(
            subprocess.Popen(
                [
                    *("unshare", "--uts", "--mount", "--propagation", "private", "bash", "-c"),
                    *(prepare, "bash", host, str(self.folder / "hosts"), *command),
                ],
                env={**os.environ, "PATH": _path()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def _all_idle(self) -> bool:
        try:
            return self._command("sinfo", "--noheader", "--states=idle", "--format=%D") == "3"
        except AssertionError:
            return False  # the controller does not answer yet

    def _stop(self) -> None:
        """End the jobs, then the daemons, which would leave running jobs alone."""
        running = [process for d in self._daemons for process in descendants(d.pid)]
        if (self.folder / "run" / "slurmctld.pid").exists():
            self._command("scancel", "--full", "--signal=KILL", "--state=RUNNING", "--user=root")
            self._command("scancel", "--user=root")
            _wait_until(lambda: not self._command("squeue", "--noheader"), "jobs do not end")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            daemon.wait(timeout=COMMAND_SECONDS)
        left = wait_until_gone(running, COMMAND_SECONDS)
        shutil.rmtree(self.folder)
        assert not left, f"the cluster left processes behind: {left}"


def free_ports(count: int) -> Sequence[int]:
    """Different ports that were free a moment ago."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port("127.0.0.1"))
    return sorted(ports)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _wait_until(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)
