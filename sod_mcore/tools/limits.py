"""How much one sandboxed program may use: a data type of its own, since every layer reads it."""

from dataclasses import dataclass, fields

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of one program. Breaking one is the program's failure, never the sandbox's.

    A program may hold at most `processes * memory_bytes + tmp_bytes` (and 8 MiB in /dev/shm), since
    the kernel counts address space by process. Only a memory cgroup bounds the sum more tightly;
    where one is available, start the process that owns the sandbox in it.

    Attributes:
        wall_seconds: from the program's first instruction to its forced end.
        cpu_seconds: CPU time of each process of the program, whole seconds.
        memory_bytes: address space of each process.
        processes: processes and threads together, the interpreter itself included.
        file_bytes: size of any one file.
        tmp_bytes: size of /tmp, which is empty at start and gone at the end.
        open_files: file descriptors of each process.
        output_bytes: standard output and standard error, each; the program is killed above it.
        startup_seconds: from the launch of an interpreter to its readiness. A slower start is an
            infrastructure failure.
    """

    wall_seconds: float = 5.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 * MEBIBYTE
    processes: int = 16
    file_bytes: int = 16 * MEBIBYTE
    tmp_bytes: int = 64 * MEBIBYTE
    open_files: int = 64
    output_bytes: int = 1 * MEBIBYTE
    startup_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Raises ValueError where a limit is not positive, or below what Python itself needs."""
        minimum = {"memory_bytes": 64 * MEBIBYTE, "open_files": 16, "cpu_seconds": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            least = minimum.get(field.name, 1)
            if field.type is int and not isinstance(value, int):
                raise ValueError(f"SandboxLimits.{field.name} = {value!r}: give a whole number")
            if field.type is float and not value > 0:
                raise ValueError(f"SandboxLimits.{field.name} = {value!r}: give seconds above 0")
            if field.type is int and value < least:
                raise ValueError(f"SandboxLimits.{field.name} = {value!r}: give at least {least}")
