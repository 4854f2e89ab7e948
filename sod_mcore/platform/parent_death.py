"""Processes that must not outlive the one that started them, even when that one is killed.

torchrun gives each rank a session of its own and the rollout pool has one as well, so no signal to
a terminal or to a process group reaches them when their parent dies of SIGKILL. The Linux kernel
does: prctl(2), PR_SET_PDEATHSIG. The request holds for the calling process only, not for its
children, and it counts from the call on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent dies; at once if it is dead already.

    Args:
        parent: the parent's process id where it is known; else the parent at the time of the call,
            and a parent that died before goes unnoticed.

    Raises:
        OSError: the kernel refuses.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid() if parent is None else parent
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
