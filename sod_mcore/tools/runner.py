"""What runs a program, wherever that is, and what it says the program did.

Tools and verifiers know this interface only: the sandbox of this machine and the client of a
SandboxFusion endpoint both have it, so the choice between them is made in one place.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from sod_mcore.tools.limits import SandboxLimits

SandboxStatus = Literal["finished", "timeout", "output_limit", "killed"]


@dataclass(frozen=True)
class SandboxResult:
    """What one program did.

    Attributes:
        stdout: standard output, decoded as UTF-8 with replacement, cut at the limit.
        stderr: standard error, likewise.
        return_code: exit code; 128 + n after signal n; None if we stopped the program.
        status: "finished" (with any exit code), "timeout", "output_limit", or "killed" (by the
            kernel, for CPU time or memory).
        wall_seconds: from the program's start to its end.
    """

    stdout: str
    stderr: str
    return_code: int | None
    status: SandboxStatus
    wall_seconds: float


class ProgramRunner(Protocol):
    """Runs Python programs that nobody has read, many at a time."""

    @property
    def limits(self) -> SandboxLimits:
        """What one program may use."""
        ...

    async def run(
        self,
        code: str,
        *,
        stdin: str = "",
        print_last_expression: bool = False,
        short_traceback: bool = False,
    ) -> SandboxResult:
        """Run one program and return what it did. A program's failure is a result, not an error.

        Args:
            code: Python source, run as `__main__`; its file name in tracebacks is `<code>`.
            stdin: the program's standard input.
            print_last_expression: print the value of a last expression statement unless it is
                None, as a notebook does.
            short_traceback: print only the message of an uncaught exception.

        Raises:
            InfrastructureError: nothing is known about the program. The call may be repeated.
        """
        ...
