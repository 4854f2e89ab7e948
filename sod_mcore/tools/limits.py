"""How much one sandboxed program may use: a data type of its own, since every layer reads it."""

from dataclasses import dataclass, fields, replace

MEBIBYTE = 1 << 20
MINIMUM_MEMORY_BYTES = 64 * MEBIBYTE
"""Address space that a warm Python needs to run anything."""


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of one program. Breaking one is the program's failure, never the sandbox's.

    A program may hold at most `processes * memory_bytes + tmp_bytes` (and 8 MiB in /dev/shm), since
    the kernel counts address space by process. Only a control group bounds the sum more tightly
    (`memory_group.py`).

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
        minimum = {"memory_bytes": MINIMUM_MEMORY_BYTES, "open_files": 16, "cpu_seconds": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            least = minimum.get(field.name, 1)
            if field.type is int and not isinstance(value, int):
                raise ValueError(f"SandboxLimits.{field.name} = {value!r}: give a whole number")
            if field.type is float and not value > 0:
                raise ValueError(f"SandboxLimits.{field.name} = {value!r}: give seconds above 0")
            if field.type is int and value < least:
                raise ValueError(f"SandboxLimits.{field.name} = {value!r}: give at least {least}")

    def lowered(
        self, *, wall_seconds: float | None = None, memory_bytes: int | None = None
    ) -> "SandboxLimits":
        """These limits, or lower ones for a single program; never higher ones.

        Memory stays above what Python itself needs, so that the program begins and fails by itself.
        """
        seconds = self.wall_seconds if wall_seconds is None else wall_seconds
        memory = self.memory_bytes if memory_bytes is None else memory_bytes
        return replace(
            self,
            wall_seconds=min(seconds, self.wall_seconds),
            memory_bytes=min(max(memory, MINIMUM_MEMORY_BYTES), self.memory_bytes),
        )
