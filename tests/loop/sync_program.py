"""What the two torchrun processes of the weight sync's tests run, against scripted engines.

Writes ``rank_<n>.json``: how much the peak memory of the process grew during each sync, how each
sync that had to fail ended, and whether torch's own process groups stayed as they were.

    torchrun --nproc-per-node 2 -m tests.loop.sync_program FOLDER

FOLDER holds ``model``, ``without_norm`` (the same, but for the tensor that comes last) and
``urls.json``, the addresses of the engines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sod_mcore.config import EngineConfig, OptimizerConfig, ServingConfig, StudentConfig
from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.loop.weight_sync import WeightSync, probe_token_ids
from sod_mcore.serving.endpoints import Endpoints, ModelEndpoints
from sod_mcore.serving.fleet.state import FleetStateFile
from sod_mcore.serving.weights.kept_groups import KeptGroups
from sod_mcore.serving.weights.transfer import WeightUpdateError
from sod_mcore.student.model_config import check_layout
from sod_mcore.student.parallel_state import distributed
from sod_mcore.student.rank_zero import RankZeroError
from sod_mcore.student.student import Student

BUCKET_MB = 4
WHOLE_MODEL_MB = 1024
CLOSED_PORT = "http://127.0.0.1:9"


def main() -> None:
    """Sync by each way, then in ways that fail, then once more."""
    folder = Path(sys.argv[1])
    config = StudentConfig(
        model_path=str(folder / "model"),
        precision="fp32",
        megatron={"tensor_model_parallel_size": 2},
    )
    sizes = check_layout(config, 2)
    with distributed(sizes, seed=1, timeout=timedelta(seconds=120)) as layout:
        student = Student.build(config, OptimizerConfig(), {}, total_updates=1, seed=1)
        student.load_hf(config.model_path)
        results = work_off(folder, student)
        (folder / f"rank_{layout.rank}.json").write_text(json.dumps(results))


@dataclass(frozen=True)
class Publisher:
    """Sends the student's weights to the scripted engines in different ways."""

    folder: Path
    student: Student
    urls: tuple[str, ...]
    groups: KeptGroups | None

    def publish(
        self,
        version: int,
        way: str,
        bucket_mb: int = BUCKET_MB,
        engine_folder: str = "model",
        engines: tuple[str, ...] = (),
        watch: EngineWatch | None = None,
        max_restarts: int = 0,
    ) -> float:
        """One sync, with ``engines`` in the place of all."""
        is_rank_zero = self.student.layout.rank == 0
        serving = ServingConfig(
            student=EngineConfig(model_path=str(self.folder / "model")),
            weight_sync=way,  # type: ignore[arg-type]
            weight_bucket_mb=bucket_mb,
            request_timeout_seconds=60.0,
            max_restarts=max_restarts,
        )
        sync = WeightSync(
            student=self.student,
            endpoints=self.fleet(engine_folder, engines) if is_rank_zero else None,
            watch=watch or EngineWatch(self.folder / "no_fleet", 0.0),
            serving=serving,
            tolerance=np.inf,  # the engines make up their scores
            directory=self.folder / "weights",
            probe_ids=probe_token_ids(self.student.vocab_size),
            group=self.student.layout.world_group,
            groups=self.groups,
        )
        difference = sync.publish(version)
        assert difference is not None
        return difference

    def publish_to_a_dead_engine(self, version: int) -> float:
        """A sync with an engine that has died so lately that nobody knows."""
        folder = self.folder / "gone"
        FleetStateFile(folder).record("dead", "student", "engine", CLOSED_PORT, "ready", 0)
        engines, watch = (*self.urls, CLOSED_PORT), EngineWatch(folder, 0.0)
        return self.publish(version, "tensor", engines=engines, watch=watch)

    def publish_with_a_death(self, version: int) -> float:
        """A sync by broadcast in which an engine dies after the first buckets."""
        self._script({"dying": 1, "accepted_buckets": 0})
        try:
            return self.publish(version, "distributed")
        finally:
            self._script({"dying": None})

    def fleet(self, engine_folder: str, engines: tuple[str, ...] = ()) -> Endpoints:
        """The engines, as if they had been started from ``engine_folder``."""
        engines = engines or self.urls
        vocab_size = self.student.vocab_size
        path = str(self.folder / engine_folder)
        model = ModelEndpoints("student", engines[0], engines, path, 512, vocab_size)
        return Endpoints(engines[0], {"student": model}, 1, 1, "elsewhere")

    def _script(self, changes: dict[str, int | None]) -> None:
        if self.student.layout.rank == 0:
            body = json.dumps(changes).encode()
            with urllib.request.urlopen(f"{self.urls[0]}/follow_script", body, timeout=10):
                pass


def work_off(folder: Path, student: Student) -> dict[str, float | str]:
    """The results of this rank by name."""
    urls = tuple(json.loads((folder / "urls.json").read_text()))
    publisher = Publisher(folder, student, urls, groups=None)
    if student.layout.rank != 0:
        return work_off_ways(publisher)
    groups = KeptGroups(publisher.fleet("model"), student.layout.device, 60.0)
    with contextlib.closing(groups):
        return work_off_ways(dataclasses.replace(publisher, groups=groups))


def work_off_ways(publisher: Publisher) -> dict[str, float | str]:
    """Every way, and what may go wrong."""
    publish, urls = publisher.publish, publisher.urls
    world, names = dist.group.WORLD, dict(distributed_c10d._world.pg_names)
    publish(1, "tensor")  # what is allocated once and for all
    results: dict[str, float | str] = {
        "disk": peak_growth_bytes(lambda: publish(2, "disk")),
        "tensor": peak_growth_bytes(lambda: publish(3, "tensor")),
        "tensor in one bucket": peak_growth_bytes(lambda: publish(4, "tensor", WHOLE_MODEL_MB)),
        "engine gone": failure(lambda: publisher.publish_to_a_dead_engine(5)),
        "last tensor refused": failure(lambda: publish(6, "tensor", engine_folder="without_norm")),
    }
    publish(7, "tensor")
    publish(8, "distributed")
    results["distributed"] = peak_growth_bytes(lambda: publish(9, "distributed"))
    results["died in a broadcast"] = failure(lambda: publisher.publish_with_a_death(10))
    publish(11, "distributed")
    for way in ("disk", "tensor", "distributed"):
        watch = WatchOfADeath(publisher.folder / f"dying_{way}", urls)
        publish(20, way, engines=watch.urls, watch=watch, max_restarts=1)
        results[f"{way}: updates begun"] = watch.begun
        results[f"{way}: weightless after the update"] = watch.is_weightless()
        watch.revive()
        results[f"{way}: weightless after the restart"] = watch.is_weightless()
    publish(21, "distributed")
    total = torch.ones(1)
    dist.all_reduce(total)
    is_same = dist.group.WORLD is world and distributed_c10d._world.pg_names == names
    results["own groups"] = f"{is_same}, {total.item():g} ranks"
    return results


class WatchOfADeath(EngineWatch):
    """Of two engines, the second is found dead only after the first update has begun.

    Attributes:
        urls: their addresses.
        begun: updates begun so far.
    """

    def __init__(self, directory: Path, urls: tuple[str, ...]) -> None:
        super().__init__(directory, patience_seconds=0.0)
        self.urls = (urls[0], CLOSED_PORT)
        self.begun = 0
        self._file = FleetStateFile(directory)
        for name, url in zip(("first", "second"), self.urls, strict=True):
            self._file.record(name, "student", "engine", url, "ready", 0)

    def begin_update(self, endpoints: Endpoints, model: str, version: int) -> Endpoints | None:
        ready = super().begin_update(endpoints, model, version)
        self.begun += 1
        self._file.record("second", "student", "engine", CLOSED_PORT, "restarting", 0)
        return ready

    def revive(self) -> None:
        """The dead engine is there again."""
        self._file.record("second", "student", "engine", CLOSED_PORT, "ready", 1)


def failure(sync: Callable[[], object]) -> str:
    """How a sync ended that must fail."""
    try:
        sync()
    except (RankZeroError, WeightUpdateError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def peak_growth_bytes(sync: Callable[[], object]) -> float:
    """The largest resident memory while ``sync`` runs, beyond what is resident before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory_bytes("VmRSS")
    sync()
    return _memory_bytes("VmHWM") - before


def _memory_bytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024.0 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
