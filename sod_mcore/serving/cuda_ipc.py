"""Whether engines can read handles of the trainer's GPU memory (``serving.weight_sync: cuda_ipc``).

An engine ends when it gets a handle that it cannot open, so what is needed is asked beforehand.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from sod_mcore.config import ConfigError, SodConfig, serving_field
from sod_mcore.serving.endpoints import Endpoints
from sod_mcore.serving.fleet.launch import TRAINER_GPU, VISIBLE_GPUS, resolve_device
from sod_mcore.serving.fleet.state import read_fleet_state

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
    for name in _updated_models(config):
        if serving.models[name].addresses:
            raise ConfigError(
                f"{CUDA_IPC}, but {serving_field(name)}.addresses names engines that somebody else "
                f"runs, which do not see rank 0's GPU; {MEND} or tensor"
            )


@dataclass(frozen=True)
class Trainer:
    """Rank 0, whose memory engines are to read.

    Attributes:
        torch: version of torch.
        has_gpu: whether torch sees one.
        environment: its environment.
    """

    torch: str
    has_gpu: bool
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)


def check_readers(config: SodConfig, endpoints: Endpoints, trainer: Trainer) -> None:
    """Refuse a running fleet and a trainer that cannot exchange handles.

    Raises:
        ConfigError: one line with the mend.
        FleetError: the fleet has ended.
    """
    serving = config.serving
    if serving is None or serving.weight_sync != "cuda_ipc":
        return
    if endpoints.is_elsewhere:
        raise ConfigError(
            f"{CUDA_IPC}, but the engines run on {endpoints.hostname}: rank 0 must be on their "
            f"machine; start it there, or {MEND} or distributed"
        )
    if not trainer.has_gpu:
        raise ConfigError(f"{CUDA_IPC}, but torch {trainer.torch} sees no GPU in rank 0; {MEND}")
    _check_allocator(trainer.environment)
    _check_visible(config, trainer.environment)
    engine_torch = torch_version(serving.python)
    if engine_torch != trainer.torch:
        raise ConfigError(
            f"{CUDA_IPC}, but torch is {trainer.torch} in the trainer and {engine_torch} in "
            f"serving.python={serving.python}; handles are read by the same version only: install "
            f"it there, or {MEND}"
        )


def _updated_models(config: SodConfig) -> tuple[str, ...]:
    """The models whose engines get weights."""
    return ("student", "teacher") if config.averages_weights else ("student",)


def _check_allocator(environment: Mapping[str, str]) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        settings = environment.get(name, "")
        for refused in ("expandable_segments:True", "backend:cudaMallocAsync"):
            if refused.lower() in settings.lower().replace(" ", ""):
                raise ConfigError(
                    f"{CUDA_IPC}, but {name} asks for {refused}, whose memory has no such handles; "
                    f"take it out, or {MEND}"
                )


def _check_visible(config: SodConfig, environment: Mapping[str, str]) -> None:
    """The engines may have been started by another configuration, and rank 0 on any GPU."""
    gpu = (environment.get(VISIBLE_GPUS) or str(TRAINER_GPU)).split(",")[0].strip()
    for server in read_fleet_state(config.serving_directory).servers:
        if server.role != "engine" or server.model not in _updated_models(config):
            continue
        if server.visible_gpus is not None and gpu not in server.visible_gpus.split(","):
            raise ConfigError(
                f"{CUDA_IPC}, but {server.url} of {server.model} was started with {VISIBLE_GPUS}="
                f"{server.visible_gpus} and does not see GPU {gpu}, which rank 0 has; start the "
                f"engines again with this configuration, and rank 0 on GPU {TRAINER_GPU}, or {MEND}"
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
