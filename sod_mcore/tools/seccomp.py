"""A seccomp filter for sandboxed programs, assembled here so that no library is needed to make it.

Namespaces do not cover every system call: ptrace, the kernel keyring, io_uring, bpf and AF_VSOCK
sockets are reachable inside them. The filter refuses these, and everything with which a program
could hold memory that no resource limit counts (memfd, System V shared memory).

The output is an array of `struct sock_filter` (linux/filter.h) for classic BPF, as the kernel and
bubblewrap's `--seccomp` read it. Numbers of system calls are those of the kernel's unistd.h.
"""

import errno
import platform
import struct
from dataclasses import dataclass

# struct sock_filter { u16 code; u8 jump_true; u8 jump_false; u32 k; }, linux/filter.h
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_GREATER = 0x25  # BPF_JMP | BPF_JGT | BPF_K
_JUMP_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

# Offsets in struct seccomp_data, linux/seccomp.h. Arguments are 64-bit; their low half is read, as
# the kernel itself takes them as 32-bit integers.
_NUMBER = 0
_ARCHITECTURE = 4
_ARGUMENT_0 = 16
_ARGUMENT_1 = 24

_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000

# CLONE_NEW* for mount, cgroup, uts, ipc, user, pid and net (clone cannot ask for a time namespace).
_CLONE_NEW_ANY = 0x7E020000
_TIOCSTI = 0x5412  # would type into the terminal of the one who started us
_TIOCLINUX = 0x541C
_AF_UNIX = 1

# Calls newer than this were not reviewed, and answer "not implemented", which libraries expect.
LAST_REVIEWED_CALL = 450

DENIED_CALLS: dict[str, tuple[int | None, int | None]] = {
    # name: (number on x86_64, number on aarch64)
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "setns": (308, 268),
    "unshare": (272, 97),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    # large kernel interfaces that a calculation never needs
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "seccomp": (317, 277),
    # memory that no resource limit counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # the machine itself
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
}


@dataclass(frozen=True)
class _Machine:
    """Audit number of an architecture (linux/audit.h) and its calls whose arguments we look at."""

    audit_number: int
    column: int
    clone: int
    clone3: int
    ioctl: int
    socket: int
    socketpair: int


_MACHINES = {
    "x86_64": _Machine(0xC000003E, 0, clone=56, clone3=435, ioctl=16, socket=41, socketpair=53),
    "aarch64": _Machine(0xC00000B7, 1, clone=220, clone3=435, ioctl=29, socket=198, socketpair=199),
}


def _instruction(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, jump_true, jump_false, k)


def _refuse(error: int) -> bytes:
    return _instruction(_RETURN, _ERRNO | error)


def _refuse_call(number: int, error: int) -> bytes:
    """Expects the call's number in the accumulator, and leaves it there."""
    return _instruction(_JUMP_EQUAL, number, 0, 1) + _refuse(error)


def _check_argument(number: int, argument_offset: int, checks: bytes) -> bytes:
    """For one call, load an argument and run `checks` on it; what they let through is allowed."""
    body = _instruction(_LOAD_WORD, argument_offset) + checks + _instruction(_RETURN, _ALLOW)
    length = len(body) // _INSTRUCTION.size
    return _instruction(_JUMP_EQUAL, number, 0, length) + body


def build_filter(machine: str | None = None) -> bytes:
    """The filter for `machine` ("x86_64" or "aarch64"; this machine by default) as BPF bytes.

    Raises:
        ValueError: system call numbers of this architecture are not listed here.
    """
    name = machine or platform.machine()
    if name not in _MACHINES:
        raise ValueError(
            f"no seccomp filter for machine {name!r}; known: {', '.join(_MACHINES)}. "
            "Add its system call numbers to sod_mcore/tools/seccomp.py."
        )
    calls = _MACHINES[name]
    program = [
        # A call made in another architecture's convention has other numbers: end it.
        _instruction(_LOAD_WORD, _ARCHITECTURE),
        _instruction(_JUMP_EQUAL, calls.audit_number, 1, 0),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD_WORD, _NUMBER),
        # Covers the x32 convention of x86_64 too, whose numbers carry bit 30.
        _instruction(_JUMP_GREATER, LAST_REVIEWED_CALL, 0, 1),
        _refuse(errno.ENOSYS),
        # Its flags lie behind a pointer, out of a filter's sight; libc falls back to clone.
        _refuse_call(calls.clone3, errno.ENOSYS),
    ]
    for numbers in DENIED_CALLS.values():
        number = numbers[calls.column]
        if number is not None:
            program.append(_refuse_call(number, errno.EPERM))
    no_namespace = _instruction(_JUMP_ANY_BIT, _CLONE_NEW_ANY, 0, 1) + _refuse(errno.EPERM)
    program.append(_check_argument(calls.clone, _ARGUMENT_0, no_namespace))
    no_typing = b"".join(_refuse_call(request, errno.EPERM) for request in (_TIOCSTI, _TIOCLINUX))
    program.append(_check_argument(calls.ioctl, _ARGUMENT_1, no_typing))
    only_unix = _instruction(_JUMP_EQUAL, _AF_UNIX, 1, 0) + _refuse(errno.EAFNOSUPPORT)
    for call in (calls.socket, calls.socketpair):
        program.append(_check_argument(call, _ARGUMENT_0, only_unix))
    program.append(_instruction(_RETURN, _ALLOW))
    return b"".join(program)
