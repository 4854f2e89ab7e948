"""The environment of processes that a rank starts and that are no ranks themselves."""

from __future__ import annotations

import os


def single_process_environment() -> dict[str, str]:
    """This process's environment without torchrun's variables."""
    torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_")
    return {key: value for key, value in os.environ.items() if not key.startswith(torchrun)}
