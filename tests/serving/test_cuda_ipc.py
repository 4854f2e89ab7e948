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
from sod_mcore.serving.cuda_ipc import check_cuda_ipc, check_readers, torch_version
from sod_mcore.serving.endpoints import Endpoints

FLEET = Endpoints("http://127.0.0.1:1", {}, 1, 1, socket.gethostname())
OURS = torch.__version__


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


@pytest.mark.parametrize(
    ("fleet", "trainer_torch", "environment", "expected"),
    [
        (FLEET, OURS, {}, None),
        (FLEET, OURS, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, None),
        (FLEET, "2.13.0+cu999", {}, f"torch is 2.13.0+cu999 in the trainer and {OURS} in "),
        (replace(FLEET, hostname="node7"), OURS, {}, "the engines run on node7"),
        (
            FLEET,
            OURS,
            {"PYTORCH_CUDA_ALLOC_CONF": "backend:native,expandable_segments:True"},
            "PYTORCH_CUDA_ALLOC_CONF asks for",
        ),
    ],
)
def test_a_trainer_that_cannot_share(
    fleet: Endpoints, trainer_torch: str, environment: dict[str, str], expected: str | None
) -> None:
    serving = configuration({"python": sys.executable}).serving
    assert serving is not None
    if expected is None:
        check_readers(serving, fleet, trainer_torch, environment)
        return
    with pytest.raises(ConfigError, match=re.escape(expected)):
        check_readers(serving, fleet, trainer_torch, environment)
    other_way = replace(serving, weight_sync="tensor")
    check_readers(other_way, fleet, trainer_torch, environment)


def test_an_interpreter_without_torch(tmp_path: Path) -> None:
    for python in (str(tmp_path / "none"), "/bin/false"):
        with pytest.raises(ConfigError, match=f"serving.python is {python}"):
            torch_version(python)
