"""Where ranks and engines go on the nodes, and whether the configuration fits there.

What ``serving`` describes is what one engine node runs. Ranks take the first GPUs of a node, by
torchrun's LOCAL_RANK; engines take those that ``serving.*.gpus`` names.
"""

from __future__ import annotations

from dataclasses import dataclass

from sod_mcore.config import ConfigError, EngineConfig, ServingConfig, SodConfig, serving_field
from sod_mcore.slurm.request import Request

MODEL_PARALLEL_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)


@dataclass(frozen=True)
class Placement:
    """Checked numbers of a job.

    Attributes:
        ranks_per_node: torchrun's processes on each trainer node.
        world_size: all ranks.
        model_parallel_size: ranks of one replica of the student.
        with_engines: whether the job starts engines (not with ``run.replay``).
        idle_gpus: GPUs of a trainer node that nothing uses.
    """

    ranks_per_node: int
    world_size: int
    model_parallel_size: int
    with_engines: bool
    idle_gpus: int


def place(config: SodConfig, request: Request) -> Placement:
    """Check the configuration against the nodes.

    Raises:
        ConfigError: they do not fit; one line with the mend.
    """
    with_engines = config.run.replay is None
    if with_engines and config.is_colocated:
        raise ConfigError(
            "serving.placement is colocated; these templates give ranks and engines GPUs of their "
            "own: set serving.placement=split, or write the job yourself"
        )
    if with_engines and config.serving is not None and config.serving.weight_sync == "cuda_ipc":
        raise ConfigError(
            "serving.weight_sync is cuda_ipc; these templates let no engine see rank 0's GPU: set "
            "serving.weight_sync=disk, or write the job yourself"
        )
    if with_engines and config.serving is None:
        raise ConfigError("serving is missing; configure the engines, or give run.replay")
    if not with_engines and request.template == "engine_nodes":
        raise ConfigError(
            f"run.replay is {config.run.replay}, which needs no engines; "
            "--template engine_nodes would leave nodes idle: choose shared_nodes or one_node"
        )
    engine_gpus: set[int] = set()
    if config.serving is not None and with_engines:
        _refuse_ray(config.serving)
        _refuse_addresses(config.serving, request)
        engine_gpus = _engine_gpus(config.serving, request)
    on_rank_nodes = set() if request.template == "engine_nodes" else engine_gpus
    ranks = _ranks_per_node(request, on_rank_nodes)
    world_size = ranks * request.trainer_nodes
    model_parallel = _model_parallel_size(config)
    if world_size % model_parallel:
        raise ConfigError(
            f"{' x '.join(f'{f}={_size(config, f)}' for f in MODEL_PARALLEL_FIELDS)} makes "
            f"{model_parallel} ranks a replica, which does not divide the {world_size} ranks "
            f"({request.trainer_nodes} nodes x {ranks}); change them, --nodes or --ranks-per-node"
        )
    idle = max(0, request.gpus_per_node - ranks - len(on_rank_nodes))
    return Placement(ranks, world_size, model_parallel, with_engines, idle)


def _ranks_per_node(request: Request, engine_gpus: set[int]) -> int:
    """As asked for, else every GPU that no engine takes."""
    gpus = request.gpus_per_node
    if gpus == 0:
        if request.ranks_per_node is None:
            raise ConfigError("--ranks-per-node is missing; without GPUs it cannot be derived")
        return request.ranks_per_node
    ranks = request.ranks_per_node or gpus - len(engine_gpus)
    if ranks < 1:
        raise ConfigError(
            f"the engines of one node take {len(engine_gpus)} GPUs, all of --gpus-per-node {gpus}; "
            "none is left for the trainer"
        )
    if ranks + len(engine_gpus) > gpus:
        raise ConfigError(
            f"--gpus-per-node is {gpus}, but {ranks} ranks and {len(engine_gpus)} GPUs of engines "
            f"need {ranks + len(engine_gpus)} on each node"
        )
    if any(gpu < ranks for gpu in engine_gpus):
        raise ConfigError(
            f"serving takes GPU {min(engine_gpus)}, but the node's {ranks} ranks take GPUs 0 to "
            f"{ranks - 1}; give the engines GPUs from {ranks} on, or lower --ranks-per-node"
        )
    return ranks


def _engine_gpus(serving: ServingConfig, request: Request) -> set[int]:
    """GPUs that the engines of one node take."""
    taken: set[int] = set()
    for name, engine in serving.models.items():
        if engine.addresses:
            continue
        _check_gpus(serving_field(name), engine, serving, request)
        shared = taken & set(engine.gpus)
        if shared:
            raise ConfigError(
                f"{serving_field(name)}.gpus is {list(engine.gpus)}: another model's engines take "
                f"GPU {min(shared)} as well; give each model its own"
            )
        taken |= set(engine.gpus)
    return taken


def _check_gpus(
    field_name: str, engine: EngineConfig, serving: ServingConfig, request: Request
) -> None:
    gpus = request.gpus_per_node
    if not engine.gpus:
        if gpus and serving.device != "cpu":
            raise ConfigError(
                f"{field_name}.gpus is empty, so its engines would share a GPU with others on the "
                f"node; name the GPUs of one node, below {gpus}"
            )
        return
    if len(set(engine.gpus)) < len(engine.gpus) or len(engine.gpus) % engine.engines:
        raise ConfigError(
            f"{field_name}.gpus is {list(engine.gpus)}, which {engine.engines} engines cannot "
            "share evenly; give each engine the same number of different GPUs"
        )
    if max(engine.gpus) >= gpus:
        raise ConfigError(
            f"{field_name}.gpus is {list(engine.gpus)}, but --gpus-per-node is {gpus}; indices are "
            "those of one node and begin with 0"
        )


def _refuse_ray(serving: ServingConfig) -> None:
    """The job's own nodes are what it has reserved."""
    if serving.engines_on == "ray":
        raise ConfigError(
            "serving.engines_on is ray, but a SLURM job starts the engines on its own nodes; set "
            "it to local"
        )


def _refuse_addresses(serving: ServingConfig, request: Request) -> None:
    """The templates for several nodes pass the engines' addresses on in those settings."""
    for name, engine in serving.models.items():
        if engine.addresses and request.template != "one_node":
            raise ConfigError(
                f"{serving_field(name)}.addresses is {list(engine.addresses)}, but --template "
                f"{request.template} starts the engines itself; leave it out, or choose one_node"
            )


def _size(config: SodConfig, field_name: str) -> int:
    value = config.student.megatron.get(field_name, 1)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"student.megatron.{field_name} is {value!r}; a whole number from 1 on is needed"
        )
    return value


def _model_parallel_size(config: SodConfig) -> int:
    product = 1
    for field_name in MODEL_PARALLEL_FIELDS:
        product *= _size(config, field_name)
    return product
