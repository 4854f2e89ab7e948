"""Engines that cannot read the trainer's GPU memory are refused before any of it is sent."""

from __future__ import annotations

import re
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from sod_mcore.config import ConfigError, SodConfig
from sod_mcore.serving.cuda_ipc import Trainer, check_cuda_ipc, check_readers, torch_version
from sod_mcore.serving.endpoints import Endpoints
from sod_mcore.serving.fleet.state import FleetStateFile

HERE = Endpoints("http://127.0.0.1:1", {}, 1, 1, socket.gethostname())
ELSEWHERE = replace(HERE, hostname="node7")
OURS = torch.__version__
ON_GPU_0 = Trainer(OURS, has_gpu=True, environment={})


def with_environment(**environment: str) -> Trainer:
    return replace(ON_GPU_0, environment=environment)


def configuration(serving: dict[str, Any], **sections: Any) -> SodConfig:
    models = {"student": {"model_path": "m"}, "teacher": {"model_path": "t"}}
    for name in models:
        models[name] |= serving.pop(name, {})
    return TypeAdapter(SodConfig).validate_python(
        {
            "run": {"directory": "runs/a"},
            "student": {"model_path": "m"},
            "data": {"train": "d.parquet"},
            "serving": {"weight_sync": "cuda_ipc", "device": "cuda", **models, **serving},
            **sections,
        }
    )


@pytest.mark.parametrize(
    ("serving", "expected"),
    [
        ({"device": "cpu"}, r"the engines run on CPUs \(serving.device\)"),
        ({"engines_on": "ray"}, "serving.engines_on is ray"),
        ({"student": {"addresses": ["http://a:1"]}}, "serving.student.addresses names engines"),
        ({"teacher": {"addresses": ["http://a:1"]}}, None),
        ({}, None),
        ({"weight_sync": "tensor", "device": "cpu"}, None),
    ],
)
def test_engines_elsewhere(serving: dict[str, Any], expected: str | None) -> None:
    config = configuration(serving)
    if expected is None:
        check_cuda_ipc(config)
        return
    with pytest.raises(ConfigError, match=f"cuda_ipc.*{expected}.*set serving.weight_sync=disk"):
        check_cuda_ipc(config)


def test_a_teacher_that_gets_the_average() -> None:
    config = configuration(
        {"teacher": {"addresses": ["http://a:1"]}},
        teacher={"weights": "average"},
    )
    with pytest.raises(ConfigError, match=r"serving\.teacher\.addresses names engines"):
        check_cuda_ipc(config)


@pytest.fixture
def config(tmp_path: Path) -> SodConfig:
    """With engines that see the GPUs 2 and 0, and a teacher that sees only 3."""
    states = FleetStateFile(tmp_path)
    for model, gpus in {"student": "2,0", "teacher": "3"}.items():
        url = f"http://127.0.0.1:{len(model)}"
        states.record(model, model, "engine", url, "ready", 0, visible_gpus=gpus)
        states.record(f"{model}_router", model, "router", "", "ready", 0)
    return configuration({"python": sys.executable, "directory": str(tmp_path)})


@pytest.mark.parametrize(
    "trainer",
    [
        ON_GPU_0,
        with_environment(CUDA_VISIBLE_DEVICES="2"),
        with_environment(PYTORCH_ALLOC_CONF="expandable_segments:False"),
    ],
)
def test_a_trainer_that_can_share(config: SodConfig, trainer: Trainer) -> None:
    check_readers(config, HERE, trainer)


@pytest.mark.parametrize(
    ("fleet", "trainer", "expected"),
    [
        (ELSEWHERE, ON_GPU_0, "the engines run on node7"),
        (HERE, replace(ON_GPU_0, has_gpu=False), f"torch {OURS} sees no GPU in rank 0"),
        (
            HERE,
            replace(ON_GPU_0, torch="2.13.0+cu999"),
            f"torch is 2.13.0+cu999 in the trainer and {OURS} in serving.python={sys.executable}",
        ),
        (
            HERE,
            with_environment(CUDA_VISIBLE_DEVICES="4,0"),
            "http://127.0.0.1:7 of student was started with CUDA_VISIBLE_DEVICES=2,0 and does not "
            "see GPU 4, which rank 0 has",
        ),
        (
            HERE,
            with_environment(PYTORCH_CUDA_ALLOC_CONF="a:1, expandable_segments: True"),
            "PYTORCH_CUDA_ALLOC_CONF asks for expandable_segments:True",
        ),
        (
            HERE,
            with_environment(PYTORCH_ALLOC_CONF="backend:cudaMallocAsync"),
            "PYTORCH_ALLOC_CONF asks for backend:cudaMallocAsync",
        ),
    ],
)
def test_a_trainer_that_cannot_share(
    config: SodConfig, fleet: Endpoints, trainer: Trainer, expected: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)) as found:
        check_readers(config, fleet, trainer)
    assert "set serving.weight_sync=disk" in str(found.value)
    assert config.serving is not None
    by_value = replace(config, serving=replace(config.serving, weight_sync="tensor"))
    check_readers(by_value, fleet, trainer)


def test_an_averaged_teacher_has_to_see_it_as_well(config: SodConfig) -> None:
    averaged = replace(config, teacher=replace(config.teacher, weights="average"))
    with pytest.raises(ConfigError, match="of teacher was started with CUDA_VISIBLE_DEVICES=3 "):
        check_readers(averaged, HERE, ON_GPU_0)


def test_an_interpreter_without_torch(tmp_path: Path) -> None:
    for python in (str(tmp_path / "none"), "/bin/false"):
        with pytest.raises(ConfigError, match=f"serving.python is {python}"):
            torch_version(python)
