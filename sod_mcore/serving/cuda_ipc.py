"""Whether engines can read handles of the trainer's GPU memory (``serving.weight_sync: cuda_ipc``).

An engine ends when it gets a handle that it cannot open, so what is needed is asked beforehand.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from sod_mcore.config import ConfigError, ServingConfig, SodConfig, serving_field
from sod_mcore.serving.endpoints import Endpoints
from sod_mcore.serving.fleet.launch import resolve_device

CUDA_IPC = "serving.weight_sync is cuda_ipc"
MEND = "set serving.weight_sync=disk"
ASK_SECONDS = 60.0
# The package's metadata will not do: on PyPI it leaves out for which CUDA torch was built.
_PRINT_TORCH = "import torch; print(torch.__version__)"


def check_cuda_ipc(config: SodConfig) -> None:
    """Refuse engines that cannot share memory with rank 0.

    Raises:
        ConfigError: one line with the mend.
    """
    serving = config.serving
    if serving is None or serving.weight_sync != "cuda_ipc":
        return
    if serving.engines_on == "ray":
        raise ConfigError(
            f"{CUDA_IPC}, which reaches engines on rank 0's machine only, but serving.engines_on "
            f"is ray; {MEND} or distributed"
        )
    if resolve_device(serving.device) != "cuda":
        raise ConfigError(f"{CUDA_IPC}, but the engines run on CPUs (serving.device); {MEND}")
    updated = ("student", "teacher") if config.averages_weights else ("student",)
    for name in updated:
        if serving.models[name].addresses:
            raise ConfigError(
                f"{CUDA_IPC}, but {serving_field(name)}.addresses names engines that somebody else "
                f"runs, which do not see rank 0's GPU; {MEND} or tensor"
            )


def check_readers(
    serving: ServingConfig,
    endpoints: Endpoints,
    trainer_torch: str,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Refuse a fleet and a trainer that cannot exchange handles.

    Args:
        trainer_torch: version of torch in the trainer.
        environment: the trainer's.

    Raises:
        ConfigError: one line with the mend.
    """
    if serving.weight_sync != "cuda_ipc":
        return
    if endpoints.is_elsewhere:
        raise ConfigError(
            f"{CUDA_IPC}, but the engines run on {endpoints.hostname}: rank 0 must be on their "
            f"machine; start it there, or {MEND} or distributed"
        )
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in environment.get(name, "").lower():
            raise ConfigError(
                f"{CUDA_IPC}, which was not made for the expandable segments that {name} asks for; "
                f"take them out of it, or {MEND}"
            )
    engine_torch = torch_version(serving.python)
    if engine_torch != trainer_torch:
        raise ConfigError(
            f"{CUDA_IPC}, but torch is {trainer_torch} in the trainer and {engine_torch} in "
            f"serving.python={serving.python}; handles are read by the same version only: install "
            f"it there, or {MEND}"
        )


def torch_version(python: str) -> str:
    """Version of torch in the environment of an interpreter, its CUDA included.

    Raises:
        ConfigError: the interpreter has none, or cannot be started.
    """
    try:
        found = subprocess.run(
            [python, "-c", _PRINT_TORCH],
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"serving.python is {python}, which does not tell its version of torch: {error}"
        ) from error
    return found.stdout.strip()
