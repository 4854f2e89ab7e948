"""Where the served models can be reached: written when all is ready, and again when an engine has
moved to another address; removed at the stop.

The file ``serving/endpoints.json`` in ``run.directory`` (or ``serving.directory``) is all that the
trainer, the rollout pool and the evaluation need to know about the processes that serve.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sod_mcore.files import write_text

RESERVED_TOKENS = 7
"""SGLang 0.5.23 refuses inputs of more than its context length less these
(tests/serving/test_engines.py measures it)."""


class FleetError(Exception):
    """The engines cannot be used; the message says why and what mends it."""


@dataclass(frozen=True)
class ModelEndpoints:
    """One served model.

    Attributes:
        name: "student", "teacher" or that of a further teacher.
        route: base URL for people and other programs: the model's router, or its only engine where
            none is needed.
        engines: base URLs of the engines, among which our own client chooses.
        model_path: Hugging Face folder that the engines loaded at their start.
        context_length: longest sequence in tokens, sampled tokens included.
        vocab_size: ids are below this; an engine does not check it and dies of a larger one.
    """

    name: str
    route: str
    engines: tuple[str, ...]
    model_path: str
    context_length: int
    vocab_size: int

    @property
    def longest_input(self) -> int:
        """Tokens that an engine takes at once; it keeps the rest of the context for itself."""
        return self.context_length - RESERVED_TOKENS


@dataclass(frozen=True)
class Endpoints:
    """All addresses of one fleet, and the process that keeps it alive.

    Attributes:
        front_door: base URL that serves every model, chosen by the request's ``model`` field.
        models: endpoints by model name.
        pid: process that started the engines.
        process_start: kernel start time of that process in clock ticks; tells it from a later
            process with the same pid.
        hostname: machine on which ``pid`` counts.
    """

    front_door: str
    models: Mapping[str, ModelEndpoints]
    pid: int
    process_start: int
    hostname: str

    def model(self, name: str) -> ModelEndpoints:
        """The endpoints of one model.

        Raises:
            FleetError: no model of that name is served.
        """
        if name not in self.models:
            served = ", ".join(sorted(self.models))
            raise FleetError(f"model {name!r} is not served; served here: {served}")
        return self.models[name]

    def reached_at(self, name: str, url: str) -> Endpoints:
        """This fleet with one model only, which is reached at ``url`` alone.

        Raises:
            FleetError: no model of that name is served.
        """
        return replace(self, models={name: replace(self.model(name), engines=(url,))})

    @property
    def is_stale(self) -> bool:
        """Whether the owner is known to be gone (on another machine that cannot be known)."""
        return not self.is_elsewhere and process_start_ticks(self.pid) != self.process_start

    @property
    def is_elsewhere(self) -> bool:
        """Whether the owner runs on another machine."""
        return self.hostname != socket.gethostname()


def endpoints_path(directory: Path) -> Path:
    """The file that holds the engines' addresses; ``directory`` is ``run.directory`` or
    ``serving.directory``."""
    return directory / "serving" / "endpoints.json"


def write_endpoints(endpoints: Endpoints, directory: Path) -> Path:
    """Write the addresses so that a reader sees either the whole file or none."""
    path = endpoints_path(directory)
    write_text(path, json.dumps(asdict(endpoints), indent=2))
    return path


def read_endpoints(directory: Path) -> Endpoints:
    """Read the addresses of the engines whose addresses lie in ``directory``.

    Raises:
        FleetError: nothing serves this run, or what did has died.
    """
    path = endpoints_path(directory)
    start = "start them with: python -m sod_mcore.serving CONFIG"
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise FleetError(
            f"there are no engines: {path} does not exist; {start} (with serving.*.addresses it "
            "starts none, but checks those that are there and writes the file)"
        ) from None
    except json.JSONDecodeError as error:
        raise FleetError(f"{path} is not JSON ({error}); delete it and {start}") from error
    try:
        models = {
            name: ModelEndpoints(**{**fields, "engines": tuple(fields["engines"])})
            for name, fields in tree.pop("models").items()
        }
        endpoints = Endpoints(models=models, **tree)
    except (KeyError, TypeError) as error:
        raise FleetError(
            f"{path} was written by another version of sod_mcore ({error}); delete it and {start}"
        ) from error
    if endpoints.is_stale:
        raise FleetError(
            f"the engines of {path} are gone: their process {endpoints.pid} has ended; {start}"
        )
    return endpoints


def engines_now(directory: Path, model: str) -> tuple[str, ...]:
    """Base URLs of a model's engines as they are written now; none where that cannot be known."""
    try:
        return read_endpoints(directory).model(model).engines
    except FleetError:
        return ()


def process_start_ticks(pid: int) -> int | None:
    """Kernel start time of a running process in clock ticks since boot; None if there is none."""
    fields = process_fields(pid)
    return None if fields is None or fields[0] == "Z" else int(fields[19])


def process_fields(pid: int) -> list[str] | None:
    """Fields of ``/proc/<pid>/stat`` from the state on; None if there is no such process."""
    try:
        # The command's name stands in brackets and may itself hold brackets and spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
