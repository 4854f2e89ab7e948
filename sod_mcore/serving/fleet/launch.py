"""Command lines and environments of the processes that serve: engines and routers."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sod_mcore.config import ConfigError, EngineConfig, ServingConfig
from sod_mcore.config.serving import MAIN_MODELS
from sod_mcore.serving.fleet.model_folder import ModelFolder

CPU_BRIDGE = Path(__file__).parents[2] / "platform" / "sglang_cpu"
ROUTER_PROGRAM = Path(__file__).with_name("router.py")

CPU_RUNNING_REQUESTS = 128
"""Requests that an engine without a GPU decodes at the same time, unless configured."""
CPU_CACHE_BYTES = 2**30
"""Key-value cache of an engine without a GPU, unless configured. SGLang's own choice is a share of
the machine's memory, which several engines and a trainer on one machine do not have."""
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
TRAINER_GPU = 0
"""Rank 0's on its machine; the other ranks have the next ones."""

Device = Literal["cpu", "cuda"]


def resolve_device(device: Literal["auto", "cpu", "cuda"]) -> Device:
    """ "auto" takes CUDA where the NVIDIA driver has made its device file."""
    if device == "auto":
        return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    return device


@dataclass(frozen=True)
class EnginePlace:
    """Which engine: the model's name, the replica's index from 0, and the kind of device."""

    name: str
    index: int
    device: Device


def check_context_length(field: str, engine: EngineConfig, folder: ModelFolder) -> None:
    """Refuse a context that SGLang would end with a traceback about; ``field`` is the section.

    Raises:
        ConfigError: it is longer than what the model was made for.
    """
    asked, longest = engine.context_length, folder.context_length
    if asked is None or asked <= longest or folder.scales_positions or engine.addresses:
        return
    raise ConfigError(
        f"{field}.context_length is {asked}, but {folder.path} was made for {longest} tokens "
        "(max_position_embeddings); give at most that"
    )


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The server's base URL."""
        return f"http://{self.host}:{self.port}"


def engine_command(
    serving: ServingConfig,
    engine: EngineConfig,
    folder: ModelFolder,
    place: EnginePlace,
    address: Address,
) -> list[str]:
    """The command line of one engine; ``extra_args`` come last, so they win."""
    command = [
        *(serving.python, "-m", "sglang.launch_server"),
        *("--model-path", engine.model_path, "--served-model-name", place.name),
        *("--host", address.host, "--port", str(address.port)),
        *("--dtype", _dtype(engine, folder, place.device), "--device", place.device),
        *("--weight-version", "0", "--log-level", "warning"),
    ]
    if engine.context_length is not None:
        command += ["--context-length", str(engine.context_length)]
    if not folder.has_tokenizer:
        # Enough for /generate with token ids; /v1/chat/completions needs a tokenizer.
        command += ["--skip-tokenizer-init"]
    if place.device == "cpu":
        command += _cpu_arguments(engine, folder)
    else:
        command += ["--tp-size", str(num_gpus(engine, place.index))]
        command += _given("--mem-fraction-static", engine.memory_fraction)
        command += _given("--max-total-tokens", engine.max_total_tokens)
        command += _given("--max-running-requests", engine.max_running_requests)
        command += _sleep_arguments(serving, place)
    return [*command, *engine.extra_args]


def _sleep_arguments(serving: ServingConfig, place: EnginePlace) -> list[str]:
    """What lets an engine release its GPU's memory; without a GPU it releases none, and says 200.

    The student gets new weights whenever it wakes; the others' are kept in the host's memory.
    """
    if serving.placement == "split":
        return []
    keep = [] if place.name == "student" else ["--enable-weights-cpu-backup"]
    return ["--enable-memory-saver", *keep]


def engine_environment(
    serving: ServingConfig,
    engine: EngineConfig,
    place: EnginePlace,
    inherited: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """The environment of one engine, from that of the process that starts it."""
    environment = dict(inherited, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if serving.placement == "colocated":
        # SGLang's memory saver refuses expandable segments, which the trainer may be set to use.
        environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        environment.pop("PYTORCH_ALLOC_CONF", None)
    if place.device == "cuda":
        if engine.gpus:
            visible = _visible_gpus(serving, engine, place)
            environment[VISIBLE_GPUS] = ",".join(map(str, visible))
        return environment
    python_path = [str(CPU_BRIDGE), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, python_path))
    environment["SGLANG_USE_CPU_ENGINE"] = "1"
    environment["SGLANG_CPU_FORK"] = "1"
    environment["OMP_NUM_THREADS"] = str(engine.threads)
    return environment


def _visible_gpus(
    serving: ServingConfig, engine: EngineConfig, place: EnginePlace
) -> tuple[int, ...]:
    """The engine's own GPUs, and after them rank 0's where it reads weights from that one: SGLang
    takes the first ones."""
    own = engine_gpus(engine, place.index)
    may_change = place.name in MAIN_MODELS
    reads_trainer = serving.weight_sync == "cuda_ipc" and may_change and TRAINER_GPU not in own
    return (*own, TRAINER_GPU) if reads_trainer else own


def num_gpus(engine: EngineConfig, index: int) -> int:
    """GPUs of replica ``index`` where engines have any: its tensor-parallel size.

    Raises:
        ConfigError: the GPUs cannot be shared evenly.
    """
    return engine.ray_gpus or max(1, len(engine_gpus(engine, index)))


def check_gpus(field: str, engine: EngineConfig) -> None:
    """Refuse GPUs that the engines of a model cannot have; ``field`` is the section.

    Raises:
        ConfigError: they cannot be shared evenly, or the engines are somebody else's.
    """
    if engine.gpus and engine.addresses:
        raise ConfigError(
            f"{field}.gpus is {list(engine.gpus)}, but {field}.addresses names engines that "
            "somebody else runs, on GPUs of their own; leave one of them out"
        )
    try:
        engine_gpus(engine, 0)
    except ConfigError as error:
        raise ConfigError(f"{field}.{error}") from error


def engine_gpus(engine: EngineConfig, index: int) -> tuple[int, ...]:
    """The GPUs of replica ``index``: an even share of the model's, in order.

    Raises:
        ConfigError: the GPUs cannot be shared evenly.
    """
    share, rest = divmod(len(engine.gpus), engine.engines)
    if rest:
        raise ConfigError(
            f"gpus is {list(engine.gpus)}, which {engine.engines} engines cannot share evenly; "
            "give each engine the same number of GPUs"
        )
    return engine.gpus[index * share : (index + 1) * share]


def cannot_be_started(python: str, log_path: Path, error: OSError) -> str:
    """What keeps ``serving.python`` from being executed, or its log from being written."""
    if error.filename in (str(log_path), str(log_path.parent)):
        return f"{log_path} cannot be written on {socket.gethostname()}: {error.strerror}"
    return f"serving.python is {python!r}, which cannot be started: {error}"


def router_command(
    serving: ServingConfig, engine_urls: Sequence[str], *, port: int, prometheus_port: int
) -> list[str]:
    """The command line of the router of one model."""
    return [
        # -P: the folder of router.py stays out of sys.path.
        *(serving.python, "-P", str(ROUTER_PROGRAM), "--worker-urls", *engine_urls),
        # The router takes an address only; engines take names as well.
        *("--host", host_address(serving.host), "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(prometheus_port)),
        # Prompts of one group share their prefix: the same engine has it in its cache.
        *("--policy", "cache_aware" if len(engine_urls) > 1 else "round_robin"),
        *("--request-timeout-secs", str(max(1, int(serving.request_timeout_seconds)))),
        *("--worker-startup-check-interval", "1", "--shutdown-grace-period-secs", "1"),
        # An engine that is paused for new weights answers no health check for a while.
        *("--health-check-timeout-secs", "30"),
        # The client retries, with new request ids; a router that retries as well multiplies the
        # load, and its circuit breaker would keep a healthy engine shut for a minute.
        *("--disable-retries", "--disable-circuit-breaker", "--log-level", "warn"),
    ]


def host_address(host: str) -> str:
    """The IPv4 address of ``serving.host`` as this machine resolves it.

    Raises:
        ConfigError: it cannot.
    """
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(
            f"serving.host is {host!r}, which this machine cannot resolve ({error}); give its "
            "address, or a name that all nodes know"
        ) from error


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def is_free_port(host: str, port: int) -> bool:
    """Whether a server could listen on a port now."""
    with socket.socket() as probe:
        # As servers do: connections of the one before that are not forgotten yet are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _cpu_arguments(engine: EngineConfig, folder: ModelFolder) -> list[str]:
    """Flags without a GPU."""
    running = engine.max_running_requests or CPU_RUNNING_REQUESTS
    total = engine.max_total_tokens or default_cpu_tokens(engine, folder, running)
    return [
        # The only attention and sampling code that needs neither a GPU nor AMX.
        *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        "--cuda-graph-backend-decode=disabled",
        "--cuda-graph-backend-prefill=disabled",
        # Measured on one core with 0.2 M parameters and 64 to 128 running requests: overlapping
        # the scheduler with the model costs a fifth of the throughput; a tokenizer, the radix cache
        # and the stream interval make no difference, so they stay as SGLang has them.
        "--disable-overlap-schedule",
        # An idle scheduler otherwise polls in a loop and takes the trainer's core.
        "--sleep-on-idle",
        *("--max-running-requests", str(running), "--max-total-tokens", str(total)),
    ]


def default_cpu_tokens(engine: EngineConfig, folder: ModelFolder, running: int) -> int:
    """Tokens of key-value cache: what fits in the budget, but at least one whole sequence and at
    most what all running requests can use."""
    context = engine.context_length or folder.context_length
    fitting = CPU_CACHE_BYTES // (4 * folder.key_value_numbers)
    return max(min(fitting, running * context), context)


def _dtype(engine: EngineConfig, folder: ModelFolder, device: Device) -> str:
    """ "auto" is resolved here, because SGLang's own "auto" turns float32 weights into float16."""
    if engine.dtype != "auto":
        return engine.dtype
    if device == "cpu":
        return "float32"
    return "bfloat16" if folder.dtype in ("float32", "None") else folder.dtype


def _given(flag: str, value: float | None) -> list[str]:
    return [] if value is None else [flag, str(value)]
