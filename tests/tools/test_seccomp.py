"""The filter's decisions, by a second reading of its bytes, and by trying the calls for real."""

import errno
import json
import platform
import struct

import pytest

from sod_mcore.tools import Sandbox
from sod_mcore.tools.seccomp import DENIED_CALLS, build_filter

ALLOW = 0x7FFF0000
KILL = 0x80000000
AUDIT_NUMBERS = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# From the kernel's tables, apart from those of the module under test.
HARMLESS = {
    "x86_64": {"read": 0, "write": 1, "mmap": 9, "fork": 57, "execve": 59, "futex": 202},
    "aarch64": {"read": 63, "write": 64, "mmap": 222, "execve": 221, "futex": 98},
}
CLONE = {"x86_64": 56, "aarch64": 220}
SOCKET = {"x86_64": 41, "aarch64": 198}
IOCTL = {"x86_64": 16, "aarch64": 29}
SIGCHLD = 17
CLONE_NEWUSER = 0x10000000
CLONE_THREAD_FLAGS = 0x3D0F00  # what libc passes for a thread
AF_VSOCK = 40


def refused(error: int) -> int:
    return 0x00050000 | error


def decide(program: bytes, audit_number: int, call: int, *arguments: int) -> int:
    """A classic-BPF interpreter for the few instructions that seccomp filters use."""
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    data = struct.pack("=IIQ6Q", call, audit_number, 0, *padded)
    instructions = list(struct.iter_unpack("=HBBI", program))
    position, accumulator = 0, 0
    while True:
        code, jump_true, jump_false, k = instructions[position]
        position += 1
        if code == 0x06:
            return int(k)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, k)
            continue
        taken = {0x15: accumulator == k, 0x25: accumulator > k, 0x45: bool(accumulator & k)}[code]
        position += jump_true if taken else jump_false


@pytest.mark.parametrize("machine", AUDIT_NUMBERS)
class TestDecisions:
    def test_listed_calls_are_refused(self, machine: str) -> None:
        program, audit = build_filter(machine), AUDIT_NUMBERS[machine]
        column = list(AUDIT_NUMBERS).index(machine)
        numbers = [pair[column] for pair in DENIED_CALLS.values() if pair[column] is not None]
        assert len(set(numbers)) == len(numbers)
        for number in numbers:
            assert number is not None
            assert decide(program, audit, number) == refused(errno.EPERM)

    def test_ordinary_calls_are_allowed(self, machine: str) -> None:
        program, audit = build_filter(machine), AUDIT_NUMBERS[machine]
        for number in HARMLESS[machine].values():
            assert decide(program, audit, number) == ALLOW

    def test_clone_makes_processes_and_threads_but_no_namespaces(self, machine: str) -> None:
        program, audit, clone = build_filter(machine), AUDIT_NUMBERS[machine], CLONE[machine]
        assert decide(program, audit, clone, SIGCHLD) == ALLOW
        assert decide(program, audit, clone, CLONE_THREAD_FLAGS) == ALLOW
        assert decide(program, audit, clone, SIGCHLD | CLONE_NEWUSER) == refused(errno.EPERM)
        assert decide(program, audit, 435) == refused(errno.ENOSYS)

    def test_only_unix_sockets(self, machine: str) -> None:
        program, audit, socket = build_filter(machine), AUDIT_NUMBERS[machine], SOCKET[machine]
        assert decide(program, audit, socket, 1) == ALLOW
        for family in (0, 2, 10, 16, AF_VSOCK):
            assert decide(program, audit, socket, family) == refused(errno.EAFNOSUPPORT)

    def test_no_typing_into_terminals(self, machine: str) -> None:
        program, audit, ioctl = build_filter(machine), AUDIT_NUMBERS[machine], IOCTL[machine]
        assert decide(program, audit, ioctl, 0, 0x5412) == refused(errno.EPERM)
        # The kernel looks at the low half of the request only.
        assert decide(program, audit, ioctl, 0, (1 << 32) | 0x5412) == refused(errno.EPERM)
        assert decide(program, audit, ioctl, 0, 0x5401) == ALLOW

    def test_unknown_and_foreign_calls(self, machine: str) -> None:
        program, audit = build_filter(machine), AUDIT_NUMBERS[machine]
        assert decide(program, audit, 451) == refused(errno.ENOSYS)
        assert decide(program, audit, 0x40000000 | 1) == refused(errno.ENOSYS)  # x32
        assert decide(program, 0x40000003, 1) == KILL  # i386


def test_unknown_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="riscv64"):
        build_filter("riscv64")


@pytest.mark.asyncio
async def test_the_kernel_refuses_them(sandbox: Sandbox) -> None:
    """Each call for real, with arguments that make it harmless where it gets through."""
    machine = platform.machine()
    column = list(AUDIT_NUMBERS).index(machine)
    calls = {name: pair[column] for name, pair in DENIED_CALLS.items() if pair[column] is not None}
    program = f"""
import ctypes, errno, json, socket
libc = ctypes.CDLL(None, use_errno=True)
def attempt(number, *arguments):
    ctypes.set_errno(0)
    value = libc.syscall(number, *(ctypes.c_long(a) for a in arguments))
    return "worked" if value >= 0 else errno.errorcode[ctypes.get_errno()]
def family(number):
    try:
        socket.socket(number, socket.SOCK_STREAM).close()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "worked"
outcome = {{name: attempt(number) for name, number in {calls!r}.items()}}
outcome["unshare a user namespace"] = attempt({calls["unshare"]}, {CLONE_NEWUSER})
outcome["clone a user namespace"] = attempt({CLONE[machine]}, {SIGCHLD | CLONE_NEWUSER}, 0, 0, 0, 0)
outcome["clone3"] = attempt(435)
outcome["unreviewed"] = attempt(460)
for name in ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"):
    outcome[name] = family(getattr(socket, name))
print(json.dumps(outcome))
"""
    result = await sandbox.run(program)
    assert result.stderr == ""
    outcome = json.loads(result.stdout)
    expected = dict.fromkeys(calls, "EPERM")
    expected |= dict.fromkeys(("unshare a user namespace", "clone a user namespace"), "EPERM")
    expected |= {"clone3": "ENOSYS", "unreviewed": "ENOSYS", "AF_UNIX": "worked"}
    families = ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK")
    expected |= dict.fromkeys(families, "EAFNOSUPPORT")
    assert outcome == expected
