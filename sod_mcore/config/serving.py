"""Settings of the engines."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from sod_mcore.config.base import STRICT, NonNegative, Positive, Seconds

MAIN_MODELS = ("student", "teacher")
"""Names of the models that every fleet has; further teachers have names of their own."""


def _check_teacher_name(name: str) -> str:
    if name in MAIN_MODELS or not name.isidentifier():
        raise ValueError(
            f"{name!r} cannot name a further teacher; take letters, digits and _, but not "
            f"{' or '.join(MAIN_MODELS)}"
        )
    return name


def _check_address(address: str) -> str:
    try:
        parts = urlsplit(address)
        is_complete = parts.scheme in ("http", "https") and parts.hostname and parts.port
    except ValueError:
        is_complete = False
    if not is_complete:
        raise ValueError(f"{address!r} is no address of an engine; write http://host:port")
    return address.rstrip("/")


EngineAddress = Annotated[str, AfterValidator(_check_address)]
"""http://host:port, without a path."""
TeacherName = Annotated[str, AfterValidator(_check_teacher_name)]
"""A name that can be part of a file name and of ``key.sub=value``, and is not taken."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class EngineConfig:
    """One served model."""

    model_path: str
    """Hugging Face folder that the engine loads."""
    engines: Positive = 1
    """Engine processes (replicas)."""
    addresses: tuple[EngineAddress, ...] = ()
    """Engines that somebody else runs, as http://host:port; then none is started."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Precision of weights and activations in the engine."""
    context_length: Positive | None = None
    """Longest sequence; null takes the model's."""
    max_total_tokens: Positive | None = None
    """Size of the key-value cache in tokens; null lets the engine choose."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of each GPU's memory that an engine takes for weights and key-value cache; null lets
    the engine choose. Without a GPU it says nothing: max_total_tokens bounds the cache there."""
    max_running_requests: Positive | None = None
    """Requests decoded at the same time; null lets the engine choose."""
    threads: Positive = 1
    """CPU threads of an engine without a GPU."""
    gpus: tuple[NonNegative, ...] = ()
    """CUDA indices of the GPUs of this model's engines, shared evenly in order; an engine's share
    is its tensor-parallel size. Empty leaves each engine one GPU of SGLang's choice. With
    engines_on ray, ray_gpus stands in their place."""
    ray_gpus: Positive | None = None
    """With engines_on ray: GPUs that each engine reserves, all on one node; its tensor-parallel
    size. null takes one, and none where device is cpu."""
    ray_cpus: Annotated[float, Field(gt=0)] | None = None
    """With engines_on ray: CPUs that each engine reserves. null takes one, and as many as threads
    where device is cpu."""
    extra_args: tuple[str, ...] = ()
    """Further command-line arguments of sglang.launch_server, as they stand."""


def serving_field(model: str) -> str:
    """The section of a served model, as it is written in a configuration."""
    return f"serving.{model}" if model in MAIN_MODELS else f"serving.teachers.{model}"


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ServingConfig:
    """The SGLang fleet: one router a model, one front door."""

    student: EngineConfig
    """The model that generates rollouts; the only one that receives new weights, unless
    teacher.weights is average."""
    teacher: EngineConfig | None = None
    """The model that scores; may be left out when nothing is distilled."""
    teachers: dict[TeacherName, EngineConfig] = Field(default_factory=dict)
    """Further teachers by name, each with the settings of serving.teacher; teacher.by_source says
    which prompts they score."""
    python: str = ".venv-sglang/bin/python"
    """Interpreter of the environment in which SGLang is installed."""
    engines_on: Literal["local", "ray"] = "local"
    """Where engines are started: on this machine, or on nodes of a Ray cluster, which reserves room
    for them and is joined for that (docs/serving.md). Routers and the front door stay here."""
    ray_address: str = "auto"
    """With engines_on ray: the cluster, as host:port, or auto for the one that this machine belongs
    to."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What engines run on; auto takes the GPUs of this machine, or of the Ray cluster, if it has
    any."""
    host: str = "127.0.0.1"
    """Interface that every server of ours binds to; an engine on a Ray node binds to the address
    that the node has in Ray."""
    port: NonNegative = 0
    """Port of the front door; 0 picks a free one."""
    placement: Literal["split", "colocated"] = "split"
    """Which GPUs engines have. split: their own. colocated: those of the trainer; then they sleep
    while it works (docs/placement.md)."""
    directory: str | None = None
    """Folder of the addresses and the engines' logs; null takes run.directory. Runs that name the
    same folder share the engines, one after the other."""
    start_timeout_seconds: Seconds = 600.0
    """Longest wait until every engine answers."""
    max_restarts: NonNegative = 3
    """Times that an engine or router which dies is started again within restart_window_seconds; one
    that dies more often ends the run. 0 lets the first death end it."""
    restart_window_seconds: Seconds = 3600.0
    """Length of the sliding window in which max_restarts counts."""
    health_timeout_seconds: Seconds = 120.0
    """Silence after which an engine that lives is killed and counts as dead. Long, because an
    engine answers between two batches only, and not while it loads new weights: on a CPU or from a
    slow disk either may take a minute."""
    request_timeout_seconds: Seconds = 300.0
    """Longest time that the engines get for one request."""
    restart_timeout_seconds: Seconds = 300.0
    """Longest wait for an engine of a model that has none left. A request that waits does not use
    up its request_timeout_seconds."""
    hedge_after_seconds: Seconds | None = None
    """Wait after which a scoring request goes to a second engine as well, and the first answer
    counts; null leaves it with the first. Sampling is never hedged: the answer that comes first is
    more often a short one."""
    max_connections: Positive = 256
    """Open requests to one model."""
    weight_sync: Literal["disk", "tensor", "distributed", "cuda_ipc"] = "disk"
    """How new weights reach the student's engines: as a folder in run.directory that every engine
    reads; or without a disk, by value over HTTP, by broadcast in a process group of rank 0 and the
    engines (NCCL where both have GPUs, else gloo), or as handles of rank 0's GPU memory, which
    engines on the GPUs of its machine read (cuda_ipc; not yet tried on a GPU)."""
    requests_in_flight: Literal["retract", "in_place"] = "retract"
    """What becomes of requests that new weights interrupt. retract computes their prefix anew with
    the new weights; in_place goes on with the keys and values of the old ones, and while any
    request runs leaves the prefix cache as it is, so that new requests use them as well."""
    weight_bucket_mb: Positive = 256
    """Weights gathered and sent at a time, MiB; bounds what weight_sync adds to rank 0's memory. A
    tensor that is larger, as the embedding may be, goes alone."""
    probe_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest difference between trainer's and engine's log-prob of the fixed probe, in nats; null
    takes 0.001 for a float32 student and 0.2 for a bfloat16 one."""

    @property
    def models(self) -> dict[str, EngineConfig]:
        """Every served model by name: the student, the teacher, further teachers."""
        main = {"student": self.student, "teacher": self.teacher}
        return {**{name: engine for name, engine in main.items() if engine}, **self.teachers}
