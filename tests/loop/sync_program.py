"""What the two torchrun processes of the weight sync's tests run, against scripted engines.

Writes ``rank_<n>.json``: how much the peak memory of the process grew during each sync, and how
each sync that had to fail ended.

    torchrun --nproc-per-node 2 -m tests.loop.sync_program FOLDER

FOLDER holds ``model``, ``without_norm`` (the same, but for the tensor that comes last) and
``urls.json``, the addresses of the engines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np

from sod_mcore.config import EngineConfig, OptimizerConfig, ServingConfig, StudentConfig
from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.loop.weight_sync import WeightSync, probe_token_ids
from sod_mcore.serving.fleet import Endpoints, ModelEndpoints
from sod_mcore.serving.fleet_state import FleetStateFile
from sod_mcore.serving.weight_transfer import WeightUpdateError
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


def work_off(folder: Path, student: Student) -> dict[str, float | str]:
    """The results of this rank by name."""
    urls = tuple(json.loads((folder / "urls.json").read_text()))

    def publish(
        version: int,
        way: str,
        bucket_mb: int = BUCKET_MB,
        engine_folder: str = "model",
        engines: tuple[str, ...] = urls,
        watch: EngineWatch | None = None,
        max_restarts: int = 0,
    ) -> float:
        model = ModelEndpoints(
            "student", engines[0], engines, str(folder / engine_folder), 512, student.vocab_size
        )
        fleet = Endpoints(engines[0], {"student": model}, 1, 1, "elsewhere")
        serving = ServingConfig(
            student=EngineConfig(model_path=str(folder / "model")),
            weight_sync=way,  # type: ignore[arg-type]
            weight_bucket_mb=bucket_mb,
            request_timeout_seconds=60.0,
            max_restarts=max_restarts,
        )
        sync = WeightSync(
            student=student,
            endpoints=fleet if student.layout.rank == 0 else None,
            watch=watch or EngineWatch(folder / "no_fleet", 0.0),
            serving=serving,
            tolerance=np.inf,  # the engines make up their scores
            directory=folder / "weights",
            probe_ids=probe_token_ids(student.vocab_size),
            group=student.layout.world_group,
        )
        return sync.publish(version)

    publish(1, "tensor")  # what is allocated once and for all
    results: dict[str, float | str] = {
        "disk": peak_growth_bytes(lambda: publish(2, "disk")),
        "tensor": peak_growth_bytes(lambda: publish(3, "tensor")),
        "tensor in one bucket": peak_growth_bytes(lambda: publish(4, "tensor", WHOLE_MODEL_MB)),
        "engine gone": failure(lambda: publish(5, "tensor", engines=(*urls, CLOSED_PORT))),
        "last tensor refused": failure(lambda: publish(6, "tensor", engine_folder="without_norm")),
    }
    for way in ("disk", "tensor"):
        watch = WatchOfADeath(folder / f"dying_{way}", urls)
        publish(20, way, engines=watch.urls, watch=watch, max_restarts=1)
        results[f"{way}: updates begun"] = watch.begun
        results[f"{way}: weightless after the update"] = watch.is_weightless()
        watch.revive()
        results[f"{way}: weightless after the restart"] = watch.is_weightless()
    publish(7, "tensor")
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

    def begin_update(self, endpoints: Endpoints, model: str) -> Endpoints:
        ready = super().begin_update(endpoints, model)
        self.begun += 1
        self._file.record("second", "student", "engine", CLOSED_PORT, "restarting", 0)
        return ready

    def revive(self) -> None:
        """The dead engine is there again."""
        self._file.record("second", "student", "engine", CLOSED_PORT, "ready", 1)


def failure(sync: Callable[[], float]) -> str:
    """How a sync ended that must fail."""
    try:
        sync()
    except (RankZeroError, WeightUpdateError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def peak_growth_bytes(sync: Callable[[], float]) -> float:
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
