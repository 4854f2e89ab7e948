"""What the user asks SLURM for, checked field by field."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from sod_mcore.config import ConfigError

Template = Literal["one_node", "shared_nodes", "engine_nodes"]
TEMPLATES: tuple[Template, ...] = get_args(Template)

DEFAULT_WARNING_SECONDS = 600
DEFAULT_MAX_RESTARTS = 20

TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<day_hours>\d+)(?::(?P<day_minutes>\d+)(?::(?P<day_seconds>\d+))?)?"
    r"|(?:(?:(?P<hours>\d+):)?(?P<clock_minutes>\d+):(?P<seconds>\d+))"
    r"|(?P<minutes>\d+))"
)
NAME = re.compile(r"[\w.,@+-]+", re.ASCII)
"""Names that a line ``#SBATCH --key=value`` takes without quotes."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of ``sod slurm``.

    Attributes:
        nodes: all nodes of the job.
        engine_nodes: how many of them hold engines alone (template ``engine_nodes``), else 0.
        gpus_per_node: 0 leaves out the request for GPUs.
        time: limit of one attempt, as sbatch takes it.
        ranks_per_node: None takes the GPUs of a node that no engine uses.
        warning_seconds: time between SLURM's warning and the limit, in which the run saves.
        max_restarts: requeues of the job.
        interface: network interface of NCCL and gloo; None leaves the choice to them.
    """

    template: Template
    nodes: int
    gpus_per_node: int
    partition: str
    time: str
    account: str | None = None
    engine_nodes: int = 0
    ranks_per_node: int | None = None
    warning_seconds: int = DEFAULT_WARNING_SECONDS
    max_restarts: int = DEFAULT_MAX_RESTARTS
    interface: str | None = None
    job_name: str | None = None

    def __post_init__(self) -> None:
        self._check_counts()
        for option in ("partition", "account", "interface", "job_name"):
            value = getattr(self, option)
            if value is not None and not NAME.fullmatch(value):
                raise ConfigError(
                    f"--{option.replace('_', '-')} is {value!r}; it may hold letters, digits and "
                    "_ . , @ + - only"
                )
        if time_limit_seconds(self.time) <= self.warning_seconds:
            raise ConfigError(
                f"--time is {self.time}, not more than the {self.warning_seconds} s between "
                "warning and end; raise --time or lower --warning-seconds"
            )

    @property
    def trainer_nodes(self) -> int:
        """Nodes that hold ranks."""
        return self.nodes - self.engine_nodes

    def _check_counts(self) -> None:
        least = {"nodes": 1, "warning_seconds": 1}
        for option in ("nodes", "gpus_per_node", "engine_nodes", "warning_seconds", "max_restarts"):
            value, smallest = getattr(self, option), least.get(option, 0)
            if value < smallest:
                raise ConfigError(
                    f"--{option.replace('_', '-')} is {value}; at least {smallest} is needed"
                )
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise ConfigError(f"--ranks-per-node is {self.ranks_per_node}; at least 1 is needed")
        if self.template == "one_node" and self.nodes != 1:
            raise ConfigError(
                f"--nodes is {self.nodes} with --template one_node; set --nodes 1, or choose "
                "shared_nodes or engine_nodes"
            )
        if self.template == "engine_nodes" and not 0 < self.engine_nodes < self.nodes:
            raise ConfigError(
                f"--engine-nodes is {self.engine_nodes}; with --template engine_nodes it counts "
                f"those of the --nodes {self.nodes} that hold engines: at least 1, and fewer than "
                "all"
            )
        if self.template != "engine_nodes" and self.engine_nodes:
            raise ConfigError(
                f"--engine-nodes is {self.engine_nodes}, which only --template engine_nodes takes"
            )


def time_limit_seconds(text: str) -> int:
    """Seconds of a time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ConfigError: it is none of these.
    """
    match = TIME.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--time is {text!r}; sbatch takes minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S, such as "
            "12:00:00"
        )
    part = {name: int(digits or 0) for name, digits in match.groupdict().items()}
    hours = 24 * part["days"] + part["day_hours"] + part["hours"]
    minutes = part["day_minutes"] + part["clock_minutes"] + part["minutes"]
    return 3600 * hours + 60 * minutes + part["day_seconds"] + part["seconds"]
