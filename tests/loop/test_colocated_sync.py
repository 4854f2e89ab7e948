"""What the weight sync asks of colocated engines, and when the trainer gives its memory back."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import save_file

from sod_mcore.config import EngineConfig, ServingConfig
from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.loop.weight_sync import PROBE_TOKENS, WeightSync, probe_token_ids
from sod_mcore.serving.endpoints import Endpoints, ModelEndpoints
from sod_mcore.serving.fleet.state import FleetStateFile
from sod_mcore.serving.sleep import EngineSleep
from tests.serving.scripted_engines import ScriptedEngines, running_engines

pytestmark = pytest.mark.usefixtures("world_of_one")

STUDENT, TEACHER = 0, 1


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": np.ones(3, np.float32)}, folder / "model.safetensors")
    return folder


def weight_sync(engines: ScriptedEngines, model: Path, teacher_follows: bool) -> WeightSync:
    directory, states = model.parent, FleetStateFile(model.parent)
    models = {}
    for name, url in zip(("student", "teacher"), engines.urls, strict=True):
        states.record(f"{name}_engine_0", name, "engine", url, "ready", 0)
        models[name] = ModelEndpoints(name, url, (url,), str(model), 512, 100)
    endpoints = Endpoints("http://127.0.0.1:9", models, 1, 1, "elsewhere")
    serving = ServingConfig(student=EngineConfig(model_path=str(model)), placement="colocated")

    def export_hf(folder: Path, **options: Any) -> None:
        shutil.copytree(model, folder, dirs_exist_ok=True)

    student = SimpleNamespace(
        layout=SimpleNamespace(rank=0, data_parallel_rank=0),
        # As the scripted engines score.
        compute_logprobs=lambda batches: [np.full(PROBE_TOKENS, -1.0, np.float32)],
        export_hf=export_hf,
    )
    return WeightSync(
        student=cast(Any, student),
        endpoints=endpoints,
        watch=EngineWatch(directory, 0.0),
        serving=serving,
        tolerance=1e-3,
        directory=directory / "weights",
        probe_ids=probe_token_ids(100),
        group=dist.group.WORLD,  # type: ignore[arg-type]
        teacher_follows=teacher_follows,
        sleep=EngineSleep(endpoints, serving, directory),
    )


@pytest.mark.parametrize("teacher_follows", [False, True])
def test_the_memory_is_given_back_before_an_engine_takes_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, teacher_follows: bool
) -> None:
    with running_engines(ScriptedEngines(notes_questions=True)) as engines:
        sync = weight_sync(engines, model, teacher_follows)
        sync.publish(0)  # the first one: they are awake
        assert "resume weights" not in engines.call_names()
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: engines.calls.append((9, "emptied")))
        for version in (1, 2):
            engines.calls.clear()
            sync.let_engines_sleep()
            assert engines.released == [{"kv_cache", "weights"}] * 2
            assert sync.publish(version) == 0.0
            names = engines.call_names()
            emptied = [n for n, name in enumerate(names) if name == "emptied"]
            resumed = [n for n, name in enumerate(names) if name.startswith("resume")]
            assert emptied[1] < min(resumed), "after training, and after the weights were gathered"
            assert len(emptied) == (3 if teacher_follows else 2)
            update = ["pause", "resume weights", "update and flush", "version", "resume kv_cache"]
            fall_asleep = ["pause", "release kv_cache weights"]
            # The teacher's engine takes part in no probe.
            student = [*fall_asleep, *update, "continue", "generate"]
            assert engines.calls_of(STUDENT)[-len(student) :] == student
            own = update if teacher_follows else ["resume weights", "resume kv_cache"]
            assert engines.calls_of(TEACHER) == [*fall_asleep, *own, "continue"]
            assert names.index("generate") < len(names) - 1, "the teacher wakes last"
        expected = "2" if teacher_follows else "default"
        assert engines.versions == ["2", expected]
